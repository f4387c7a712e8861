"""What the kernel reads for each query tile, worked out from the index before the launch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, tiles_after
from pallas_kernels.common.tiling import round_up

# begin, count, origin, front, tail, first_row, length, columns_full, columns_all.
FIELDS = 9


class Plan(NamedTuple):
    """Scalars of every query tile, and which gathered columns it sees."""

    lists: Int[Array, "batch heads num_q_blocks fields"]
    column_ids: Int[Array, "batch heads padded_columns"]
    column_bits: Int[Array, "batch heads num_q_blocks words"]

    @property
    def num_columns(self) -> int:
        return self.column_ids.shape[2]


def make_plan(index: BlockSparseIndex, *, kv_len: int, lengths, q_offset) -> Plan:
    """Splits each list into masked and full tiles and marks the columns each query tile sees."""
    block_q, block_kv = index.block_q, index.block_kv
    num_columns = index.columns.shape[2]
    padded = round_up(num_columns, block_kv)
    capacity = index.entries.shape[2]
    ids = jnp.pad(index.columns, ((0, 0), (0, 0), (0, padded - num_columns)))

    def one_head(entries, begin, count, origin, ids, column_count, length):
        number = jnp.arange(begin.shape[0])
        first_row = q_offset + number * block_q
        begin = jnp.clip(begin, 0, capacity - 1)
        last = origin + entries[jnp.clip(begin + count - 1, 0, capacity - 1)]
        tail = ((count > 0) & (last < 0)).astype(jnp.int32)
        limit = jnp.minimum(first_row + 1, length) - block_kv
        front = tiles_after(entries, begin, count, origin, limit)
        front = jnp.minimum(front, count - tail)
        # At least one tile goes first: a masked one, or one that lies after every key.
        front = jnp.maximum(front, 1 - tail)
        full = everything = jnp.zeros_like(count)
        bits = jnp.zeros((begin.shape[0], 0), jnp.int32)
        if padded:
            bits, full, everything = _see_columns(
                entries, begin, count, origin, ids, column_count, length, first_row, block_q, block_kv
            )
        lists = jnp.stack(
            [begin, count, origin, front, tail, first_row, jnp.broadcast_to(length, begin.shape), full, everything],
            axis=-1,
        )
        return lists, bits

    over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, 0, 0, 0, None))
    lists, bits = jax.vmap(over_heads)(
        index.entries, index.begin, index.count, index.origin, ids, index.column_count, lengths
    )
    return Plan(lists, ids, bits)


def _see_columns(entries, begin, count, origin, ids, column_count, length, first_row, block_q, block_kv):
    """Bits of the columns that each query tile sees, and how many column tiles it visits."""
    column = jnp.arange(ids.shape[0])

    def one_tile(begin, count, origin, first_row):
        after = tiles_after(entries, begin, count, origin, ids)
        start = origin + entries[jnp.minimum(begin + after, entries.shape[0] - 1)]
        covered = (after < count) & (ids < start + block_kv)
        real = (column < column_count) & (ids < length) & (ids < first_row + block_q)
        use = real & ~covered
        bit = jnp.left_shift(use.astype(jnp.int32), column % 32)
        bits = jnp.sum(bit.reshape(-1, 32), axis=1)
        end = jnp.max(jnp.where(use, column + 1, 0))
        early = jnp.sum((column < column_count) & (ids <= first_row))
        return bits, end, early

    bits, end, early = jax.vmap(one_tile)(begin, count, origin, first_row)
    everything = -(-end // block_kv)
    full = jnp.where(end <= early, everything, jnp.minimum(early // block_kv, everything))
    return bits, full.astype(jnp.int32), everything.astype(jnp.int32)


def gather_columns(k, v, index: BlockSparseIndex):
    """Keys and values of each head's columns [batch, heads, padded_columns, head_dim]."""
    heads, num_columns = index.columns.shape[1:]
    kv_heads = k.shape[2]
    padded = round_up(num_columns, index.block_kv)
    used = jnp.arange(num_columns) < index.column_count[..., None]
    rows = jnp.where(used, jnp.clip(index.columns, 0, k.shape[1] - 1), 0)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded - num_columns)))
    kv_head = jnp.arange(heads) // (heads // kv_heads)
    take = jax.vmap(lambda x, rows: x[rows, kv_head[:, None]])
    return take(k, rows), take(v, rows)
