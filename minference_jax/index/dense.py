"""The list of everything: dense attention as an index, and query tiles that fall back to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from minference_jax.index import fallback, tiles
from pallas_kernels.block_sparse_attention.index import (
    ALIGNMENT,
    BlockSparseIndex,
    num_q_blocks,
    resolve_lengths,
)


def dense_index(
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
    block_q: int,
    block_kv: int,
) -> BlockSparseIndex:
    """The index that visits every causal pair."""
    lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
    first = q_offset + jnp.arange(num_q_blocks(q_len, block_q)) * block_q
    entries, count, origin = dense_lists(first, kv_len, block_q=block_q, block_kv=block_kv)
    real = first[None, None, :] < lengths[:, None, None]
    shape = (batch, heads, first.shape[0])
    return BlockSparseIndex(
        entries=jnp.broadcast_to(entries, (batch, heads, entries.shape[0])),
        begin=jnp.zeros(shape, jnp.int32),
        count=jnp.broadcast_to(jnp.where(real, count, 0), shape),
        origin=jnp.broadcast_to(origin, shape),
        columns=jnp.zeros((batch, heads, 0), jnp.int32),
        column_count=jnp.zeros((batch, heads), jnp.int32),
        block_q=block_q,
        block_kv=block_kv,
    )


def dense_lists(
    first: Int[Array, " num_q_blocks"], kv_len: int, *, block_q: int, block_kv: int
) -> tuple[Int[Array, " capacity"], Int[Array, " num_q_blocks"], Int[Array, " num_q_blocks"]]:
    """The one list of all tiles, and the count and origin with which each query tile reads it.

    Args:
        first: position of each query tile's first row.
        kv_len: keys.
        block_q: rows of a query tile.
        block_kv: keys of a tile.
    """
    entries = tiles.tiles_of_everything(
        kv_len, first[0] % ALIGNMENT, block_q=block_q, block_kv=block_kv
    )
    origin = (first // ALIGNMENT * ALIGNMENT).astype(jnp.int32)
    return entries, tiles.count_reaching(entries, origin, block_kv), origin


def dense_like(
    like: BlockSparseIndex,
    q_len: int,
    kv_len: int,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
) -> BlockSparseIndex:
    """The dense index in the shapes of another, which has room for the list of everything."""
    batch, heads = like.begin.shape[:2]
    blocks = {"block_q": like.block_q, "block_kv": like.block_kv}
    index = dense_index(batch, heads, q_len, kv_len, lengths=lengths, q_offset=q_offset, **blocks)
    shift = None if like.shift is None else jnp.zeros_like(index.begin)
    grow = lambda x, like: jnp.pad(x, [(0, n) for n in np.subtract(like.shape, x.shape)])
    return jax.tree.map(grow, dataclasses.replace(index, shift=shift), like)


def make_dense(
    index: BlockSparseIndex,
    dense: Bool[Array, "batch heads num_q_blocks"],
    kv_len: int,
    *,
    q_offset: Int[Array, ""],
) -> BlockSparseIndex:
    """Lets the marked query tiles visit every key; those that visit nothing stay empty."""
    entries, count, origin = _dense_lists_of(index, kv_len, q_offset)
    dense = dense & (index.count > 0)
    batch, heads, capacity = index.entries.shape
    everything = jnp.broadcast_to(entries, (batch, heads, entries.shape[0]))
    shift = None if index.shift is None else jnp.where(dense, 0, index.shift)
    return dataclasses.replace(
        index,
        entries=jnp.concatenate([index.entries, everything], axis=2),
        begin=jnp.where(dense, capacity, index.begin),
        count=jnp.where(dense, count[None, None, :], index.count),
        origin=jnp.where(dense, origin[None, None, :], index.origin),
        shift=shift,
    )


def make_costly_dense(
    index: BlockSparseIndex, dense_above: float, kv_len: int, *, q_offset: Int[Array, ""]
) -> BlockSparseIndex:
    """Makes each query tile dense that would execute more than `dense_above` times as many tiles.

    Its columns then lie inside its tiles, so they cost nothing.
    """
    first = _first_rows(index, q_offset)
    _, count, _ = _dense_lists_of(index, kv_len, q_offset)
    executed = fallback.executed_tiles(
        index.count, index.columns, index.column_count, first + index.block_q - 1, index.block_kv
    )
    costly = executed > dense_above * count[None, None, :]
    return make_dense(index, costly, kv_len, q_offset=q_offset)


def _dense_lists_of(index, kv_len, q_offset):
    blocks = {"block_q": index.block_q, "block_kv": index.block_kv}
    return dense_lists(_first_rows(index, q_offset), kv_len, **blocks)


def _first_rows(index, q_offset):
    return q_offset + jnp.arange(index.begin.shape[2]) * index.block_q
