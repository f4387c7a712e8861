"""Heads whose list costs more than dense attention become dense.

The cost of a query tile is what the kernel executes for it: its key tiles, and the tiles of
`block_kv` gathered columns that reach back before its last row. A ragged tile costs as much as a
full one, so a head's cost is the plain sum over the query tiles that hold a real row. Sums stay
below 2^31 up to 4M queries by 4M keys in tiles of 64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


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


def heads_above(
    executed: Int[Array, "batch heads num_q_blocks"],
    dense: Int[Array, "*#batch_heads num_q_blocks"],
    dense_above: float,
) -> Bool[Array, "batch heads"]:
    """Which heads of which batch rows cost more than `dense_above` times dense attention.

    Args:
        executed: tiles that each query tile executes, 0 without real rows.
        dense: tiles that dense attention executes for it.
        dense_above: the share of dense attention's cost at which a list stops to pay.
    """
    dense_cost = jnp.sum(jnp.where(executed > 0, dense, 0), axis=2)
    return jnp.sum(executed, axis=2) > dense_above * dense_cost
