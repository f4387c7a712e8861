"""Heads whose list costs more than dense attention become dense.

Before any list is made, a whole layer can be seen not to pay: its budgets predict a density, and
the index takes a fixed time, which at `break_even` keys is that of dense attention.

The cost of a query tile is what the kernel executes for it: its key tiles, and the tiles of
`block_kv` gathered columns that reach back before its last row. A ragged tile costs as much as a
full one, so a head's cost is the plain sum over the query tiles that hold a real row. Sums stay
below 2^31 up to 4M queries by 4M keys in tiles of 64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from minference_jax.patterns import BLOCK_SIZE, HeadPatterns, Kind
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, visits_everything


def executed_tiles(
    count: Int[Array, "batch heads num_q_blocks"],
    columns: Int[Array, "batch heads num_columns"],
    column_count: Int[Array, "batch heads"],
    last_row: Int[Array, " num_q_blocks"],
    block_kv: int,
) -> Int[Array, "batch heads num_q_blocks"]:
    """Tiles that each query tile executes: its key tiles and its tiles of gathered columns.

    Args:
        count: key tiles of each query tile; 0 for a query tile without real rows.
        columns: gathered columns, ascending.
        column_count: how many of them are used.
        last_row: position of each query tile's last row.
        block_kv: keys of a tile.
    """
    if columns.shape[2] == 0:
        return count

    def one_head(columns, column_count):
        seen = jnp.searchsorted(columns, last_row, side="right", method="scan_unrolled")
        return -(-jnp.minimum(seen.astype(jnp.int32), column_count) // block_kv)

    column_tiles = jax.vmap(jax.vmap(one_head))(columns, column_count)
    return jnp.where(count > 0, count + column_tiles, 0)


def executed_by(
    index: BlockSparseIndex,
    first: Int[Array, " num_q_blocks"],
    lengths: Int[Array, " batch"],
) -> Int[Array, "batch heads num_q_blocks"]:
    """`executed_tiles` of an index; a query tile that runs densely has its columns in its tiles."""
    last_row = first + index.block_q - 1
    tiles = executed_tiles(index.count, index.columns, index.column_count, last_row, index.block_kv)
    end = jnp.minimum(lengths[:, None], 1 + last_row[None, :])
    return jnp.where(visits_everything(index, end), index.count, tiles)


def heads_above(
    executed: Int[Array, "batch heads num_q_blocks"],
    dense: Int[Array, "*#batch_heads num_q_blocks"],
    dense_above: float,
    total: Callable[[Any], Any] = lambda of_heads: of_heads,
) -> Bool[Array, "batch heads"]:
    """Which heads of which batch rows cost more than `dense_above` times dense attention.

    Args:
        executed: tiles that each query tile executes, 0 without real rows.
        dense: tiles that dense attention executes for it.
        dense_above: the share of dense attention's cost at which a list stops to pay.
        total: sums arrays of heads over the devices that hold other query tiles.
    """
    dense_cost = jnp.sum(jnp.where(executed > 0, dense, 0), axis=2)
    cost, dense_cost = total((jnp.sum(executed, axis=2), dense_cost))
    return cost > dense_above * dense_cost


def too_short(q_len: int, kv_len: int, break_even: int) -> bool:
    """Whether building an index takes as long as dense attention, so that no index can pay."""
    return _share(q_len, kv_len, break_even) >= 1.0


def in_doubt(q_len: int, kv_len: int, break_even: int) -> bool:
    """Whether building an index takes a time that counts (2 %) beside dense attention."""
    return _share(q_len, kv_len, break_even) > 0.02


def pays(patterns: HeadPatterns, q_len: int, kv_len: int, break_even: int) -> Bool[Array, ""]:
    """Whether one layer's budgets can win back the time that building its index takes.

    A budget's density is predicted from its sizes alone: every query sees half the columns, all
    near distances, and each searched distance costs two keys; dense attention sees half the keys.
    Real heads need more (3.6 keys a distance for (500, 700) at 16K tokens, by
    `experiments/results/cpu/visited.jsonl`), so that layers in doubt are estimated.
    """
    kind = patterns.kind
    lined = patterns.sink_size + patterns.window_size
    searched = patterns.vertical_size / 2 + 2.0 * patterns.slash_size
    keys = jnp.where(kind == Kind.VERTICAL_SLASH, searched, lined)
    keys = jnp.where(kind == Kind.BLOCK_SPARSE, patterns.num_blocks * BLOCK_SIZE, keys)
    density = jnp.where(kind == Kind.DENSE, 1.0, keys / ((kv_len - q_len) + q_len / 2))
    return jnp.mean(jnp.minimum(density, 1.0)) + _share(q_len, kv_len, break_even) < 1.0


def _share(q_len, kv_len, break_even):
    """Time of building an index over that of dense attention, which goes with the pairs."""
    return break_even**2 / (q_len * (2 * kv_len - q_len))
