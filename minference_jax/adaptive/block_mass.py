"""Key blocks by the mass that they really hold: what better estimates could reach, for analysis."""

import dataclasses
import functools
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import Layout, check_number, per_list, split_heads
from minference_jax.adaptive.lists import each_list, index_of_blocks
from minference_jax.adaptive.scores import masked_softmax, products
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMass:
    """Keeps the key blocks that hold at least a share `mass` of a query tile's softmax weight.

    A block's share is the sum of the softmax weights of its keys, scored against every key, and
    its mean over the tile's rows, or over the last row of each of `rows` groups. One bar for all
    tiles and heads keeps the most weight that lists of blocks can keep with as many blocks, if
    every row is scored. That costs more than dense attention: this is the oracle that estimates are
    measured against, not a way to save time.

    Attributes:
        mass: share of the weight from which a block is kept, 0 to 1; less keeps more.
        rows: rows of a whole query tile that are scored (static; divides block_q).
    """

    by_tile: ClassVar[bool] = True
    mass: Any
    rows: int = dataclasses.field(default=128, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a parameter out of range."""
        check_number("mass", self.mass, 0.0, 1.0)
        check_number("rows", self.rows, 1, 2**31)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
    ) -> BlockSparseIndex:
        """The index; see `Estimator`."""
        if layout.block_q % self.rows:
            raise ValueError(f"`rows` ({self.rows}) must divide `block_q` ({layout.block_q})")
        kv_len = k.shape[1]
        q = split_heads(q, k.shape[2], layout)
        keys = jnp.pad(k, ((0, 0), (0, -kv_len % layout.block_kv), (0, 0), (0, 0)))
        choose = functools.partial(_choose, layout=layout, wanted=self.rows)
        return index_of_blocks(
            each_list(choose, per_list(self.mass, "mass", q), keys.swapaxes(1, 2), layout.block_q),
            q, kv_len, lengths=lengths, q_offset=q_offset, layout=layout,
            scores_per_tile=self.rows * keys.shape[1],
        )  # fmt: skip


def _choose(mass, keys, rows, tile, first, end, *, layout, wanted):
    """Blocks [tiles, num_blocks] that some query tiles of one list keep; see `each_list`."""
    apart = layout.block_q // wanted
    begins = first[:, None] + jnp.arange(0, layout.block_q, apart)[None, :]
    # The last real row of each group: it sees all that the others see.
    position = jnp.maximum(jnp.minimum(begins + apart, end) - 1, first[:, None])
    rows = jnp.take_along_axis(rows, (position - first[:, None])[:, None, :, None], axis=2)
    visible = jnp.arange(keys.shape[0])[None, None, :] <= position[..., None]
    visible = (visible & (begins < end)[..., None])[:, None]
    weights = masked_softmax(products(rows, keys) * keys.shape[1] ** -0.5, visible)
    scored = jnp.maximum(jnp.sum(begins < end, axis=1), 1) * rows.shape[1]
    share = jnp.sum(weights, axis=(1, 2)) / scored[:, None]
    return jnp.sum(share.reshape(len(first), -1, layout.block_kv), axis=2) >= mass
