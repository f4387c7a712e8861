"""From a choice of key blocks for each query tile to the index, some query tiles at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import Layout, for_all_heads
from minference_jax.index.dense import make_dense
from minference_jax.index.select import compact
from pallas_kernels.block_sparse_attention.index import NO_TILE, BlockSparseIndex, num_q_blocks
from pallas_kernels.common.tiling import cdiv

# Numbers that one step over query tiles may hold for each intermediate, over all heads: 256 MB of
# float32. Many launches at long contexts cost less than the memory of fewer.
ELEMENTS = 2**26


def index_of_blocks(
    choose: Callable[..., Array],
    q: Float[Array, "batch q_len kv_heads lists members head_dim"],
    kv_len: int,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    layout: Layout,
    scores_per_tile: int,
) -> BlockSparseIndex:
    """The index of the blocks that `choose` keeps, of every query tile's own blocks, causal.

    A query tile whose list would not fit the layout's capacity visits every key.

    Args:
        choose: `choose(rows, tile, first, end)` marks key blocks [batch, kv_heads, lists, tiles,
            num_blocks] for some query tiles: their rows [batch, tiles * block_q, kv_heads, lists,
            members, head_dim] (those at or beyond `end` are anything), their numbers [tiles], the
            positions of their first rows [tiles], and the positions after the last real query
            [batch].
        q: queries by list.
        kv_len: keys.
        lengths: real keys of each batch row.
        q_offset: position of the first query among the keys.
        layout: tile sizes, sharing and capacity.
        scores_per_tile: numbers that `choose` holds for a query tile of one query head.
    """
    batch, q_len, kv_heads, lists, members, _ = q.shape
    num_tiles = num_q_blocks(q_len, layout.block_q)
    num_blocks, capacity = cdiv(kv_len, layout.block_kv), layout.capacity(kv_len)
    end = jnp.minimum(lengths, q_offset + q_len)
    start = jnp.arange(num_blocks, dtype=jnp.int32) * layout.block_kv
    take = lambda keep: compact(start[::-1], keep[::-1], capacity, NO_TILE)
    for _ in range(4):  # tiles, lists, KV heads, batch rows
        take = jax.vmap(take)

    heads = kv_heads * lists * members
    per_tile = batch * heads * max(scores_per_tile, num_blocks)
    steps = cdiv(num_tiles, max(1, ELEMENTS // per_tile))
    step = cdiv(num_tiles, steps)

    def some_tiles(number):
        tile = number * step + jnp.arange(step)
        first = q_offset + tile * layout.block_q
        keep = choose(_rows_of_tiles(q, number * step, step, layout.block_q), tile, first, end)
        stop = jnp.minimum((first + layout.block_q)[None, :], end[:, None])
        visible = start[None, None, :] < stop[..., None]
        visible &= (first[None, :] < end[:, None])[..., None]
        own = own_blocks(first, num_blocks, layout)[None, None, None]
        keep = (keep | own) & visible[:, None, None]
        return take(keep), jnp.sum(keep, axis=4).astype(jnp.int32)

    entries, count = jax.lax.map(some_tiles, jnp.arange(steps))
    # [steps, batch, kv_heads, lists, tiles of a step, ...] to [batch, all lists, tiles, ...]
    by_list = lambda x: jnp.moveaxis(x, 0, 3).reshape(batch, kv_heads * lists, -1, *x.shape[5:])
    entries, count = (by_list(x)[:, :, :num_tiles] for x in (entries, count))
    index = _index(entries, count, layout)
    if capacity < num_blocks:
        index = make_dense(index, count > capacity, kv_len, q_offset=q_offset)
    return for_all_heads(index, q)


def each_list(
    choose: Callable[..., Array], per_list: Any, per_kv_head: Any, block_q: int
) -> Callable[..., Array]:
    """What `index_of_blocks` takes, from a choice for one list.

    Args:
        choose: `choose(per_list, per_kv_head, rows, tile, first, end)` marks key blocks [tiles,
            num_blocks] for rows [tiles, members, block_q, head_dim] and a scalar `end`.
        per_list: pytree of arrays [batch, kv_heads, lists, ...] that `choose` needs.
        per_kv_head: likewise [batch, kv_heads, ...].
        block_q: rows of a query tile.
    """
    over_lists = jax.vmap(choose, in_axes=(0, None, 0, None, None, None))
    over_kv_heads = jax.vmap(over_lists, in_axes=(0, 0, 0, None, None, None))
    over_batch = jax.vmap(over_kv_heads, in_axes=(0, 0, 0, None, None, 0))

    def choose_all(rows, tile, first, end):
        rows = rows.reshape(rows.shape[0], -1, block_q, *rows.shape[2:])
        rows = rows.transpose(0, 3, 4, 1, 5, 2, 6)
        return over_batch(per_list, per_kv_head, rows, tile, first, end)

    return choose_all


def _index(entries, count, layout):
    """The index whose query tiles have lists of their own [batch, lists, tiles, capacity]."""
    batch, lists, tiles, capacity = entries.shape
    begin = jnp.arange(tiles, dtype=jnp.int32) * capacity
    return BlockSparseIndex(
        entries=entries.reshape(batch, lists, -1),
        begin=jnp.broadcast_to(begin, count.shape),
        count=count,
        origin=jnp.zeros_like(count),
        columns=jnp.zeros((batch, lists, 0), jnp.int32),
        column_count=jnp.zeros((batch, lists), jnp.int32),
        block_q=layout.block_q,
        block_kv=layout.block_kv,
    )


def own_blocks(first: Int[Array, " tiles"], num_blocks: int, layout: Layout) -> Array:
    """Blocks that end after a query tile's first row [tiles, num_blocks]: its own and later ones.

    All others lie in the past of each of its rows.
    """
    end = (jnp.arange(num_blocks) + 1) * layout.block_kv
    return end[None, :] > first[:, None]


def _rows_of_tiles(q, tile, number, block_q):
    """Rows of `number` query tiles from `tile` on.

    Returns:
        [batch, number * block_q, kv_heads, lists, members, head_dim]; anything beyond q's last row.
    """
    rows = number * block_q
    if q.shape[1] < rows:
        q = jnp.pad(q, ((0, 0), (0, rows - q.shape[1]), *((0, 0),) * 4))
    # A slice that would pass the end is moved back; turning it puts the wanted rows first again.
    at = jnp.minimum(tile * block_q, q.shape[1] - rows)
    part = jax.lax.dynamic_slice_in_dim(q, at, rows, axis=1)
    if q.shape[1] % rows:
        part = jnp.roll(part, at - tile * block_q, axis=1)
    return part
