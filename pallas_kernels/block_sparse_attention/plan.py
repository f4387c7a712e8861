"""What the kernel reads for each query tile, worked out from the index before the launch."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_sparse_attention.columns import column_bits
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, tiles_after
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
    first_row = q_offset + jnp.arange(index.begin.shape[2]) * index.block_q
    begin = jnp.clip(index.begin, 0, index.entries.shape[2] - 1)
    index = dataclasses.replace(index, begin=begin)

    def one_head(lists, shift, length):
        after = lambda key: tiles_after(lists.entries, lists.begin, lists.count, lists.origin, key)
        # Tiles that begin before key 0 are last in the list, those at the diagonal first.
        tail = lists.count - after(jnp.full_like(lists.begin, -1))
        front = after(jnp.minimum(first_row + 1, length - shift) - index.block_kv)
        # At least one item is masked; for an empty list it is a tile after every key.
        front = jnp.maximum(jnp.minimum(front, lists.count - tail), (tail == 0).astype(jnp.int32))
        return front, tail

    over_heads = jax.vmap(one_head, in_axes=(0, 0, None))
    front, tail = jax.vmap(over_heads)(index, index.later(), lengths)
    num_columns = index.columns.shape[2]
    padding = round_up(num_columns, index.block_kv) - num_columns
    ids = jnp.pad(index.columns, ((0, 0), (0, 0), (0, padding)))
    if num_columns:
        bits, full, everything = column_bits(index, ids, lengths=lengths, first_row=first_row)
    else:
        bits, full, everything = (
            jnp.zeros((*begin.shape, 0), jnp.int32),
            *(jnp.zeros_like(begin),) * 2,
        )
    fields = (
        begin, index.count, index.origin, index.later(), front, tail, first_row[None, None],
        lengths[:, None, None], full, everything,
    )  # fmt: skip
    return Plan(jnp.stack([jnp.broadcast_to(x, begin.shape) for x in fields], axis=-1), ids, bits)


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
