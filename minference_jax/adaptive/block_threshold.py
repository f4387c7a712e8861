"""Key blocks above a share of the best one, for each query tile."""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import Layout, check_number, per_list, split_heads
from minference_jax.adaptive.lists import index_of_blocks, own_blocks
from minference_jax.adaptive.scores import masked_softmax, products
from minference_jax.index.block_sparse import block_means
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockThreshold:
    """Keeps the key blocks whose score is at least `alpha` times the query tile's best: no sort.

    Each query row takes the softmax, over the blocks that lie in the past of its whole query tile,
    of its scaled products with the blocks' mean keys. A block's score is the sum of that over the
    tile's rows. The first and the nearest blocks are kept besides, and a tile's own blocks.

    Attributes:
        alpha: share of the best score from which a block is kept, 0 to 1; less keeps more.
        sink_blocks: first blocks, always kept.
        local_blocks: nearest blocks, the query tile's own included, always kept.
        pooled_rows: rows whose mean takes part as one row (static; divides block_q). Scores then
            cost this many times less.
    """

    alpha: Any
    sink_blocks: Any = 2
    local_blocks: Any = 4
    pooled_rows: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a parameter out of range."""
        check_number("alpha", self.alpha, 0.0, 1.0)
        check_number("pooled_rows", self.pooled_rows, 1, 2**31)

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
        if layout.block_q % self.pooled_rows:
            raise ValueError(
                f"`pooled_rows` ({self.pooled_rows}) must divide `block_q` ({layout.block_q})"
            )
        kv_len = k.shape[1]
        q = split_heads(q, k.shape[2], layout)
        names = ("alpha", "sink_blocks", "local_blocks")
        parameters = tuple(per_list(getattr(self, name), name, q) for name in names)
        means = jax.vmap(lambda k, length: block_means(k, layout.block_kv, length))
        means = jax.vmap(means, in_axes=(2, None), out_axes=1)(k, lengths).astype(k.dtype)
        choose = functools.partial(_choose, layout=layout, pooled_rows=self.pooled_rows)
        return index_of_blocks(
            choose, parameters, means, q, kv_len, lengths=lengths, q_offset=q_offset,
            layout=layout,
            scores_per_tile=layout.block_q // self.pooled_rows * cdiv(kv_len, layout.block_kv),
        )  # fmt: skip


def _choose(parameters, means, rows, tile, first, end, *, layout, pooled_rows):
    """Blocks [tiles, num_blocks] that some query tiles of one list keep; see `index_of_blocks`."""
    alpha, sink_blocks, local_blocks = parameters
    num_blocks = means.shape[0]
    past = ~own_blocks(first, num_blocks, layout)
    real = first[:, None] + jnp.arange(layout.block_q)[None, :] < end
    scores = block_scores(rows, means, real, past, pooled_rows)
    keep = past & (scores >= alpha * jnp.max(scores, axis=1, keepdims=True))
    block = jnp.arange(num_blocks)[None, :]
    last = (jnp.minimum(first + layout.block_q, end) - 1) // layout.block_kv
    return keep | (block < sink_blocks) | (last[:, None] - block < local_blocks)


def block_scores(rows, means, real, past, pooled_rows):
    """Softmax over past blocks of each row, summed over the rows of a query tile (one list).

    Args:
        rows: queries [tiles, members, block_q, head_dim].
        means: mean keys [num_blocks, head_dim].
        real: which rows count [tiles, block_q].
        past: which blocks take part [tiles, num_blocks].
        pooled_rows: rows whose mean counts as one.

    Returns:
        Scores, float32 [tiles, num_blocks]; 0 where a block takes no part.
    """
    tiles, members, _, head_dim = rows.shape
    real = real.reshape(tiles, 1, -1, pooled_rows)
    if pooled_rows > 1:
        rows = rows.reshape(tiles, members, -1, pooled_rows, head_dim).astype(jnp.float32)
        number = jnp.maximum(jnp.sum(real, axis=3), 1)[..., None]
        pooled = jnp.sum(jnp.where(real[..., None], rows, 0.0), axis=3) / number
        rows = pooled.astype(means.dtype)
    scores = products(rows, means) * head_dim**-0.5
    weights = masked_softmax(scores, past[:, None, None, :])
    return jnp.sum(jnp.where(jnp.any(real, axis=3)[..., None], weights, 0.0), axis=(1, 2))
