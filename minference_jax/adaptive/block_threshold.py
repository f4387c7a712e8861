"""Key blocks above a share of the best one, for each query tile."""

import dataclasses
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import Layout, check_number, per_list, split_heads
from minference_jax.adaptive.lists import index_of_blocks
from minference_jax.index.block_sparse import block_means
from pallas_kernels.block_scores import block_scores
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockThreshold:
    """Keeps the key blocks whose score is at least `alpha` times the query tile's best: no sort.

    Each query row takes the softmax of its scaled products with mean keys: those of every part of a
    block, for the blocks that lie in the past of its whole query tile, sinks apart. A block's score
    is the sum of that over its parts and over the tile's rows. The first and the nearest blocks are
    kept besides, and a tile's own blocks.

    Sinks take no part because many heads rest there: their weight says nothing about what such a
    head adds to the output (values of sinks are small), yet it would set a bar no block can pass.

    Attributes:
        alpha: share of the best score from which a block is kept, 0 to 1; less keeps more.
        sink_blocks: first blocks, always kept (static).
        local_blocks: nearest blocks, the query tile's own included, always kept.
        pooled_rows: rows whose mean takes part as one row (static; divides block_q). Scores then
            cost this many times less.
        parts: mean keys of each block (static; divides block_kv). More find keys that stand out
            from those around them; scores cost this many times more.
    """

    by_tile: ClassVar[bool] = True
    alpha: Any
    sink_blocks: int = dataclasses.field(default=1, metadata={"static": True})
    local_blocks: Any = 4
    pooled_rows: int = dataclasses.field(default=16, metadata={"static": True})
    parts: int = dataclasses.field(default=4, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a parameter out of range."""
        check_number("alpha", self.alpha, 0.0, 1.0)
        check_number("sink_blocks", self.sink_blocks, 0, 2**30)
        check_number("pooled_rows", self.pooled_rows, 1, 2**31)
        check_number("parts", self.parts, 1, 2**31)

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
        for name, whole in (("pooled_rows", "block_q"), ("parts", "block_kv")):
            if getattr(layout, whole) % getattr(self, name):
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must divide `{whole}` "
                    f"({getattr(layout, whole)})"
                )
        kv_len = k.shape[1]
        num_blocks = cdiv(kv_len, layout.block_kv)
        sinks = min(self.sink_blocks, num_blocks - 1)
        q = split_heads(q, k.shape[2], layout)
        # [batch, kv_heads, lists, tiles, blocks]
        number = lambda name: per_list(getattr(self, name), name, q)[..., None, None]
        alpha, local_blocks = map(number, ("alpha", "local_blocks"))
        means = self._means(k, lengths, layout.block_kv)[:, :, sinks * self.parts :]
        block = jnp.arange(num_blocks)[None, None, None, None, :]

        def choose(rows, tile, first, end):
            past = jnp.clip(first // layout.block_kv - sinks, 0, num_blocks - sinks)
            real_rows = jnp.clip(end - first[0], 0, rows.shape[1])
            rows, real_rows = pool_rows(rows, real_rows, self.pooled_rows)
            scores = block_scores(
                rows, means, past=past * self.parts, real_rows=real_rows,
                tile_rows=layout.block_q // self.pooled_rows,
            )  # fmt: skip
            scores = jnp.sum(scores.reshape(*scores.shape[:4], -1, self.parts), axis=5)
            best = scores >= alpha * jnp.max(scores, axis=4, keepdims=True)
            keep = jnp.pad(best, ((0, 0),) * 4 + ((sinks, 0),))
            keep &= block < sinks + past[None, None, None, :, None]
            last = jnp.minimum((first + layout.block_q)[None, :], end[:, None]) - 1
            last = (last // layout.block_kv)[:, None, None, :, None]
            return keep | (block < self.sink_blocks) | (last - block < local_blocks)

        return index_of_blocks(
            choose, q, kv_len, lengths=lengths, q_offset=q_offset, layout=layout,
            scores_per_tile=num_blocks * self.parts,
        )  # fmt: skip

    def _means(self, k, lengths, block_kv):
        """Mean keys of the parts of all blocks [batch, kv_heads, blocks * parts, head_dim]."""
        k = jnp.pad(k, ((0, 0), (0, -k.shape[1] % block_kv), (0, 0), (0, 0)))
        means = jax.vmap(lambda k, length: block_means(k, block_kv // self.parts, length))
        return jax.vmap(means, in_axes=(2, None), out_axes=1)(k, lengths).astype(k.dtype)


def pool_rows(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    real_rows: Int[Array, " batch"],
    pooled: int,
) -> tuple[Float[Array, "batch pooled kv_heads lists members head_dim"], Int[Array, " batch"]]:
    """Means of every `pooled` rows, of those before real_rows, and how many hold a real row."""
    if pooled == 1:
        return q, real_rows
    batch, rows = q.shape[:2]
    real = (jnp.arange(rows)[None, :] < real_rows[:, None]).reshape(batch, -1, pooled, 1, 1, 1, 1)
    parts = q.reshape(batch, -1, pooled, *q.shape[2:]).astype(jnp.float32)
    means = jnp.sum(jnp.where(real, parts, 0.0), axis=2) / jnp.maximum(jnp.sum(real, axis=2), 1)
    return means.astype(q.dtype), -(-real_rows // pooled)
