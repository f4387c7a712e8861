"""How much each head of a real model visits, kept in files and prescribed to random weights.

Scores of random weights mean nothing: by them an adaptive method keeps nearly everything or
nearly nothing. So the number of key blocks that every query tile of every head visits is taken from
a real model at the same length, and only this number. The estimate runs at its full cost (pooled
scores, comparison, lists, columns of the last queries), and plan and attention kernel run over the
lists that are visited. The blocks lie evenly spread over what the tile may see: at random places,
neighbouring query tiles would share less, nearest to the diagonal more.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import minference_jax as mj
from experiments.common.errors import UserError
from experiments.common.methods import Method, parse_method, slug
from minference_jax.adaptive.layout import Estimator, Layout
from minference_jax.index.dense import make_dense
from minference_jax.recommended import ALPHA, NUM_COLUMNS
from pallas_kernels.block_sparse_attention.index import NO_TILE, BlockSparseIndex
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prescribed:
    """An estimator that runs another one, and visits as many blocks as it is told.

    Attributes:
        estimator: of blocks; runs at its full cost, but what it finds is not visited.
        counts: key blocks of every query tile of a prompt [heads, tiles], for a model [layers,
            heads, tiles]. A tile with more than the layout's lists can hold visits every key, as
            ever.
    """

    estimator: Estimator
    counts: Any

    @property
    def by_tile(self) -> bool:
        """Whether the other one decides for each query tile alone; see `Estimator`."""
        return getattr(self.estimator, "by_tile", False)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
    ) -> BlockSparseIndex:
        """The index; see `Estimator`. Tiles beyond a prompt's end visit nothing."""
        found = self.estimator(q, k, lengths=lengths, q_offset=q_offset, layout=layout)
        kv_len, capacity = k.shape[1], layout.capacity(k.shape[1])
        tile = jnp.arange(found.count.shape[2], dtype=jnp.int32)
        first = q_offset + tile * layout.block_q
        ends = jnp.minimum(first[None, :] + layout.block_q, lengths[:, None])
        real = (first[None, :] < ends)[:, None]
        visible = jnp.where(real, -(-ends // layout.block_kv)[:, None], 0)
        own = cdiv(layout.block_q, layout.block_kv)
        told = jnp.take(self.counts, first // layout.block_q, axis=1, mode="clip")
        wanted = jnp.clip(told[None], jnp.minimum(own, visible), visible)
        # What was estimated takes part, with nothing, so that the compiler cannot drop it.
        wanted += jnp.minimum(found.count, 0)
        slot = jnp.arange(capacity, dtype=jnp.int32)
        slot, most = slot[None, None, None], visible[..., None]
        past = slot * most // jnp.maximum(wanted, 1)[..., None]
        start = (most - 1 - past) * layout.block_kv
        estimated = found.entries[:, :, : tile.size * capacity].reshape(start.shape)
        start += jnp.minimum(estimated - NO_TILE, 0)
        entries = jnp.where(slot < wanted[..., None], start, NO_TILE)
        index = dataclasses.replace(
            found,
            entries=entries.reshape(*wanted.shape[:2], -1),
            begin=jnp.broadcast_to((tile * capacity)[None, None], wanted.shape),
            count=wanted,
            origin=jnp.zeros_like(wanted),
        )
        if capacity < cdiv(kv_len, layout.block_kv):
            index = make_dense(index, wanted > capacity, kv_len, q_offset=q_offset)
        return index


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Densities:
    """What a real model visited, one file for each method and length.

    Attributes:
        folder: of the files.
    """

    folder: Path

    def path(self, method: str, length: int) -> Path:
        """The file of a method and a length."""
        return self.folder / f"{slug(method)}-{length}.npz"

    def write(
        self, method: str, length: int, counts: Int[np.ndarray, "layers heads tiles"], model: str
    ) -> None:
        """Keeps the key blocks that each query tile visited."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path(method, length).open("wb") as file:
            np.savez_compressed(file, counts=counts.astype(np.int32), model=np.str_(model))

    def prescribe(
        self,
        method: Method,
        attention: Any,
        length: int,
        *,
        layers: int,
        heads: int,
        head_dim: int,
    ) -> tuple[Any, str | None]:
        """Returns an attention that visits as much as the real model's, and where that is from.

        Layers and heads of the real model stand for the nearest ones of this one. Attention that
        estimates nothing stays as it is.

        Raises:
            UserError: nothing is known of the method at this length.
        """  # fmt: skip
        if not isinstance(attention, mj.AdaptiveAttention):
            return attention, None
        label = same_for_any_model(method).label
        path = self.path(label, length)
        if not path.is_file():
            raise UserError(
                f"{self.folder} has nothing about {label} at {length} tokens; measure it there "
                f"first: minference ttft --model … --methods {label} --lengths {length} "
                f"--densities {self.folder}"
            )
        with np.load(path) as file:
            counts, model = file["counts"], str(file["model"])
        tiles = cdiv(length, attention.layout.block_q)
        if counts.shape[2] != tiles:
            raise UserError(f"{path} is of {counts.shape[2]} query tiles, expected {tiles}")
        nearest = lambda wanted, found: (np.arange(wanted) * 2 + 1) * found // (2 * wanted)
        taken = counts[nearest(layers, counts.shape[0])][:, nearest(heads, counts.shape[1])]
        told = lambda blocks: Prescribed(blocks, jnp.asarray(taken, jnp.int32))
        estimator = attention.estimator
        if isinstance(estimator, mj.WithColumns):
            estimator = dataclasses.replace(estimator, blocks=told(estimator.blocks))
        else:
            estimator = told(estimator)
        break_even = attention.keys_to_break_even(heads, head_dim)
        prescribed = dataclasses.replace(attention, estimator=estimator, break_even=break_even)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        return prescribed, f"{model}, {path.name}, sha256 {digest}"


def same_for_any_model(method: Method) -> Method:
    """What `minference` is for a model without a search of its own; other methods as they are."""
    if method.family != "minference":
        return method
    return parse_method(f"hybrid:{ALPHA:g},{NUM_COLUMNS}")
