"""A head's attention, and what its index visits, on a coarse grid of queries and keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.patterns.read import AnyArray, weights_of
from pallas_kernels import BlockSparseIndex
from pallas_kernels.block_sparse_attention.index import visited_keys


class HeadMap(NamedTuple):
    """Cells of `step` queries and keys, and one share of the whole head.

    Attributes:
        attention: share of its attention that a query of the cell's rows gives to the cell's keys,
            in the mean over the rows; the cells of a row sum to 1.
        tiles: share of the cell's causal pairs that lie inside visited tiles.
        columns: share of them that is visited through single columns, outside the tiles.
        recall: share of the attention that is visited, mean over all queries.
    """

    attention: Float[AnyArray, "cells cells"]
    tiles: Float[AnyArray, "cells cells"]
    columns: Float[AnyArray, "cells cells"]
    recall: Float[AnyArray, ""]


@functools.partial(jax.jit, static_argnames="step")
def head_map(
    q: Float[Array, "1 length heads head_dim"],
    k: Float[Array, "1 length kv_heads head_dim"],
    index: BlockSparseIndex,
    head: Int[Array, ""],
    *,
    step: int,
) -> HeadMap:
    """The map of one head; O(length) memory.

    Args:
        q: queries.
        k: keys.
        index: what the layer's heads visit.
        head: number of the head.
        step: queries and keys of a cell.
    """
    length = k.shape[1]
    cells = -(-length // step)
    queries, keys = q[0, :, head], k[0, :, head // (q.shape[2] // k.shape[2])]
    lists = jax.tree.map(lambda x: x[0, head], index)
    part = index.block_q // index.halves  # rows that visit the same keys
    key = jnp.arange(length)

    def visited(number, column_count):
        tile, half = jnp.divmod(number, lists.halves)
        return visited_keys(
            lists.entries, lists.begin[tile], lists.count[tile],
            lists.origin[tile] + half * lists.later()[tile], lists.columns, column_count,
            kv_len=length, block_q=lists.block_q, block_kv=lists.block_kv,
        )  # fmt: skip

    def one_part(total, number):
        rows = number * part + jnp.arange(part)
        weights = weights_of(queries, keys, rows)
        causal = (key[None, :] <= rows[:, None]) & (rows < length)[:, None]
        tiles = visited(number, jnp.zeros_like(lists.column_count))
        all_keys = visited(number, lists.column_count)

        def grid(values):
            padded = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, cells * step - length)))
            by_key = jnp.sum(padded.reshape(-1, cells, step), axis=2)
            return jax.ops.segment_sum(by_key, rows // step, cells)

        inside = jnp.sum(weights * all_keys[None, :])
        sums = (weights, causal & tiles[None, :], causal & (all_keys & ~tiles)[None, :], causal)
        return jax.tree.map(jnp.add, total, (*map(grid, sums), inside)), None

    zero = (*(jnp.zeros((cells, cells)),) * 4, jnp.zeros(()))
    (attention, tiles, columns, causal, inside), _ = jax.lax.scan(
        one_part, zero, jnp.arange(-(-length // part))
    )
    height = jnp.minimum(length, (1 + jnp.arange(cells)) * step) - jnp.arange(cells) * step
    share = lambda count: count / jnp.maximum(causal, 1.0)
    return HeadMap(attention / height[:, None], share(tiles), share(columns), inside / length)
