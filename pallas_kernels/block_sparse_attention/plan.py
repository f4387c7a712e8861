"""What the kernel reads for each query tile, worked out from the index before the launch."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_sparse_attention.index import (
    BlockSparseIndex,
    covered_columns,
    tiles_after,
)
from pallas_kernels.common.tiling import round_up

# begin, count, origin, shift, front, tail, first_row, length, columns_full, columns_all.
FIELDS = 10


class Plan(NamedTuple):
    """Scalars of every query tile, and which gathered columns it sees."""

    lists: Int[Array, "batch heads num_q_blocks fields"]
    column_ids: Int[Array, "batch heads padded_columns"]
    column_bits: Int[Array, "batch heads num_q_blocks words"]


def make_plan(
    index: BlockSparseIndex, *, lengths: Int[Array, " batch"], q_offset: Int[Array, ""]
) -> Plan:
    """Splits each list into masked and full tiles and marks the columns each query tile sees."""
    num_columns = index.columns.shape[2]
    padded = round_up(num_columns, index.block_kv)
    ids = jnp.pad(index.columns, ((0, 0), (0, 0), (0, padded - num_columns)))

    def one_head(lists, shift, ids, length):
        first_row = q_offset + jnp.arange(lists.begin.shape[0]) * index.block_q
        begin = jnp.clip(lists.begin, 0, lists.entries.shape[0] - 1)
        lists = dataclasses.replace(lists, begin=begin)
        after = lambda key: tiles_after(lists.entries, begin, lists.count, lists.origin, key)
        # Tiles that begin before key 0 go last in the list, those at the diagonal first.
        tail = lists.count - after(jnp.full_like(begin, -1))
        front = after(jnp.minimum(first_row + 1, length - shift) - index.block_kv)
        # At least one tile goes first: a masked one, or one that lies after every key.
        front = jnp.maximum(jnp.minimum(front, lists.count - tail), (tail == 0).astype(jnp.int32))
        full = everything = jnp.zeros_like(front)
        bits = jnp.zeros((begin.shape[0], 0), jnp.int32)
        if padded:
            bits, full, everything = _see_columns(lists, shift, ids, length, first_row)
        fields = (
            begin, lists.count, lists.origin, shift, front, tail, first_row, length, full,
            everything,
        )  # fmt: skip
        return jnp.stack([jnp.broadcast_to(x, begin.shape) for x in fields], axis=-1), bits

    over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, None))
    lists, bits = jax.vmap(over_heads)(index, index.later(), ids, lengths)
    return Plan(lists, ids, bits)


def _see_columns(lists, shift, ids, length, first_row):
    """Bits of the columns that each query tile of a head sees, and its tiles of columns."""
    column = jnp.arange(ids.shape[0])

    def one_tile(begin, count, origin, shift, first_row):
        real = (column < lists.column_count) & (ids < length) & (ids < first_row + lists.block_q)
        covered = [
            covered_columns(lists.entries, begin, count, origin + half * shift, ids, lists.block_kv)
            for half in range(lists.halves)
        ]
        uses = [real & ~x for x in covered]
        shifted = [jnp.left_shift(use.astype(jnp.int32), column % 32) for use in uses]
        bits = jnp.concatenate([jnp.sum(x.reshape(-1, 32), axis=1) for x in shifted])
        end = jnp.max(jnp.where(functools.reduce(jnp.logical_or, uses), column + 1, 0))
        early = jnp.sum((column < lists.column_count) & (ids <= first_row))
        return bits, end, early

    bits, end, early = jax.vmap(one_tile)(lists.begin, lists.count, lists.origin, shift, first_row)
    everything = -(-end // lists.block_kv)
    full = jnp.where(end <= early, everything, jnp.minimum(early // lists.block_kv, everything))
    return bits, full.astype(jnp.int32), everything.astype(jnp.int32)


def gather_columns(k, v, index: BlockSparseIndex):
    """Keys and values of each head's columns [batch, heads, padded_columns, head_dim]."""
    heads, num_columns = index.columns.shape[1:]
    kv_heads = k.shape[2]
    padded = round_up(num_columns, index.block_kv)
    used = jnp.arange(num_columns)[None, None, :] < index.column_count[..., None]
    rows = jnp.where(used, jnp.clip(index.columns, 0, k.shape[1] - 1), 0)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded - num_columns)))
    kv_head = jnp.arange(heads) // (heads // kv_heads)
    take = jax.vmap(lambda x, rows: x[rows, kv_head[:, None]])
    return take(k, rows), take(v, rows)
