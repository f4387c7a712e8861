"""Whole block diagonals, by the mass that the last queries give to their distances."""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import (
    Layout,
    check_number,
    for_all_heads,
    per_list,
    split_heads,
    sum_members,
)
from minference_jax.index.dense import dense_lists
from minference_jax.index.lines import LAST_Q, last_query_scores
from minference_jax.index.select import compact, top_k_mask
from minference_jax.index.tiles import count_reaching
from pallas_kernels.block_sparse_attention.index import (
    ALIGNMENT,
    NO_TILE,
    BlockSparseIndex,
    num_q_blocks,
)
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockDiagonals:
    """Keeps the diagonals of blocks of largest estimated mass: one short list for each head.

    Diagonal m of a query tile is the tile of keys that lies m tiles before its own. Its mass is
    estimated from the last 64 queries' mass at each distance: a row at a random place of its query
    tile finds a distance inside the diagonal with a chance that rises and falls linearly (for
    square tiles), and the mass of a distance counts with that chance. The tiles that hold a query
    tile's own rows are always kept, inside the budget.

    Attributes:
        num_diagonals: diagonals of each list.
    """

    num_diagonals: Any

    def __post_init__(self) -> None:
        """Raises ValueError for a budget below one."""
        check_number("num_diagonals", self.num_diagonals, 1, 2**30)

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
        (batch, q_len, _, _), kv_len = q.shape, k.shape[1]
        blocks = {"block_q": layout.block_q, "block_kv": layout.block_kv}
        _, slash = last_query_scores(q, k, lengths=lengths, q_offset=q_offset, last_q=LAST_Q)
        by_list = split_heads(q, k.shape[2], layout)
        budget = per_list(self.num_diagonals, "num_diagonals", by_list)
        first = q_offset + jnp.arange(num_q_blocks(q_len, layout.block_q)) * layout.block_q
        everything, _, origin = dense_lists(first, kv_len, **blocks)
        own = jnp.sum(everything > -layout.block_kv)

        def one_list(slash, budget, end):
            mass = diagonal_mass(slash, everything.shape[0], q_offset % ALIGNMENT, **blocks)
            mass = jnp.where(jnp.arange(mass.shape[0]) < own, jnp.inf, mass)
            chosen = top_k_mask(mass, jnp.maximum(budget, own))
            entries = compact(everything, chosen, everything.shape[0], NO_TILE)
            count = count_reaching(entries, origin, layout.block_kv)
            return entries, jnp.where(first < end, count, 0)

        over_lists = jax.vmap(jax.vmap(one_list, in_axes=(0, 0, None)), in_axes=(0, 0, None))
        entries, count = jax.vmap(over_lists)(sum_members(slash, by_list), budget, lengths)
        count = count.reshape(batch, -1, first.shape[0])
        index = BlockSparseIndex(
            entries=entries.reshape(batch, -1, everything.shape[0]),
            begin=jnp.zeros_like(count),
            count=count,
            origin=jnp.broadcast_to(origin, count.shape),
            columns=jnp.zeros((*count.shape[:2], 0), jnp.int32),
            column_count=jnp.zeros(count.shape[:2], jnp.int32),
            **blocks,
        )
        return for_all_heads(index, by_list)


def diagonal_mass(
    slash: Float[Array, " kv_len"],
    num_diagonals: int,
    shift: Int[Array, ""],
    *,
    block_q: int,
    block_kv: int,
) -> Float[Array, " num_diagonals"]:
    """Expected mass of each entry of the list of everything, for a row at a random place.

    Args:
        slash: mass of each distance, of one list.
        num_diagonals: entries of that list.
        shift: position of the query tiles' first rows modulo 8.
        block_q: rows of a query tile.
        block_kv: keys of a tile.
    """
    # Row r of a query tile, at position origin + shift + r, finds distance t inside diagonal m iff
    # low <= r - (t - m block_kv) < low + block_kv.
    low = block_q + jnp.where(shift > 0, ALIGNMENT, 0) - block_kv - shift
    before = cdiv(block_q + ALIGNMENT, block_kv)
    windows = before + cdiv(block_kv + ALIGNMENT, block_kv) + 1
    distance = jnp.arange(windows * block_kv) - before * block_kv
    rows = jnp.clip(distance + low + block_kv, 0, block_q) - jnp.clip(distance + low, 0, block_q)
    chance = (rows / block_q).reshape(windows, block_kv)
    length = (num_diagonals + windows) * block_kv
    slash = jnp.pad(slash, (before * block_kv, max(length - slash.shape[0], 0)))[:length]
    slash = slash.reshape(-1, block_kv)
    parts = [
        jnp.sum(slash[w : w + num_diagonals] * chance[w][None, :], axis=1) for w in range(windows)
    ]
    return functools.reduce(jnp.add, parts)
