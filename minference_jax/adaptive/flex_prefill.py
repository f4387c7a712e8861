"""FlexPrefill: vertical and diagonal blocks, or blocks by query, by coverage gamma and test tau."""

import dataclasses
import functools
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.adaptive import lists
from minference_jax.adaptive.layout import (
    Layout,
    check_number,
    per_list,
    split_heads,
    sum_members,
)
from minference_jax.adaptive.scores import masked_softmax, products
from minference_jax.index.block_sparse import block_means
from minference_jax.index.lines import last_queries, last_query_scores
from minference_jax.index.select import largest_threshold, top_k_mask, top_mass_count
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlexPrefill:
    """Chooses between two patterns for each head, and how much of it (ICLR 2025).

    The last block_q queries' softmax gives the mass of each key and of each distance (as shares).
    * Vertical-slash: as many blocks of keys as `1 + floor(n / block_kv)`, where n of the largest
      keys together hold at most `gamma`, and likewise as many block diagonals; the first block of
      keys and the main diagonal first, both counts within the budgets.
    * Query-aware: the softmax of products between the means of query tiles and key blocks; of all
      entries of that map the fewest that hold `gamma` of its mass, and a vertical-slash of the
      smallest budget.
    A head is query-aware if the Jensen-Shannon distance (natural logarithm) between the key
    blocks' mass and the softmax from the mean of the last queries is below `tau`.

    Attributes:
        gamma: share of the mass to keep, 0 to 1; more keeps more.
        tau: distance below which a head is query-aware; 0 for none.
        min_budget: keys, the least that verticals and that diagonals get.
        max_budget: keys, the most that each of them gets.
    """

    gamma: Any
    tau: Any = 0.1
    min_budget: Any = 512
    max_budget: Any = 2**30

    def __post_init__(self) -> None:
        """Raises ValueError for a parameter out of range."""
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_number("tau", self.tau, 0.0, 2.0)
        check_number("min_budget", self.min_budget, 0, 2**30)
        check_number("max_budget", self.max_budget, 1, 2**30)

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
        at = {"lengths": lengths, "q_offset": q_offset}
        q_len, kv_len = q.shape[1], k.shape[1]
        end = jnp.minimum(lengths, q_offset + q_len)
        by_list = split_heads(q, k.shape[2], layout)
        names = ("gamma", "tau", "min_budget", "max_budget")
        budgets = _Budgets(*(per_list(getattr(self, name), name, by_list) for name in names))
        means = jax.vmap(lambda k, end: block_means(k, layout.block_kv, end), in_axes=(1, None))
        means = jax.vmap(means)(k, end).astype(k.dtype)

        scores = last_query_scores(q, k, last_q=layout.block_q, **at)
        vertical, slash = (sum_members(x, by_list) for x in scores)
        last, first = last_queries(q, last_q=layout.block_q, **at)
        last = _means_by_list(last, k.shape[2], layout.block_q, end - first, layout)
        one_list = functools.partial(_choose_lines, layout=layout)
        over_lists = jax.vmap(one_list, in_axes=(0, 0, 0, 0, None, None))
        over_kv_heads = jax.vmap(over_lists, in_axes=(0, 0, 0, 0, 0, None))
        lines = jax.vmap(over_kv_heads)(budgets, vertical, slash, last[:, :, :, 0], means, end)

        queries = _means_by_list(q, k.shape[2], layout.block_q, end - q_offset, layout)
        least = jax.lax.cond(
            jnp.any(lines.query_aware),
            lambda: _least_kept(queries, means, budgets.gamma, end, q_offset, layout),
            lambda: jnp.zeros(budgets.gamma.shape, jnp.int32),
        )
        choose = functools.partial(_choose, layout=layout)
        return lists.index_of_blocks(
            lists.each_list(choose, (lines, queries, least), means, layout.block_q),
            by_list, kv_len, layout=layout, scores_per_tile=cdiv(kv_len, layout.block_kv), **at,
        )  # fmt: skip


class _Budgets(NamedTuple):
    gamma: Array
    tau: Array
    min_budget: Array
    max_budget: Array


class _Lines(NamedTuple):
    """What one list keeps for every query tile."""

    columns: Bool[Array, "*lists num_blocks"]
    diagonals: Bool[Array, "*lists num_blocks"]
    query_aware: Bool[Array, "*lists"]


def _means_by_list(q, kv_heads, block_q, rows, layout):
    """Mean queries of blocks of rows [batch, kv_heads, lists, blocks, head_dim], of real rows."""
    by_list = split_heads(q, kv_heads, layout)
    means = lambda q, rows: block_means(q, block_q, rows)
    for _ in range(3):  # members, lists, KV heads: each time the axis after the rows
        means = jax.vmap(means, in_axes=(1, None))
    return jnp.mean(jax.vmap(means)(by_list, rows), axis=3).astype(q.dtype)


def _choose_lines(budgets, vertical, slash, last, means, end, *, layout):
    """Column and diagonal blocks of one list, and whether it is query-aware."""
    num_blocks = means.shape[0]
    block = jnp.arange(num_blocks)
    real = block * layout.block_kv < end
    shares = jnp.stack([vertical, slash])
    shares = shares / jnp.maximum(jnp.sum(shares, axis=1, keepdims=True), 1e-30)
    pool = lambda x: jnp.sum(
        jnp.pad(x, (0, num_blocks * layout.block_kv - x.shape[0])).reshape(num_blocks, -1), axis=1
    )
    estimate = _map(last[None], means, real[None])[0]
    query_aware = _js_distance(estimate, pool(shares[0])) < budgets.tau
    low, high = (jnp.maximum(x // layout.block_kv, 1) for x in budgets[2:])

    def choose(scores):
        keys = jnp.maximum(top_mass_count(scores, budgets.gamma) - 1, 0)
        wanted = jnp.clip(1 + keys // layout.block_kv, low, high)
        blocks = jnp.where(block == 0, jnp.inf, jnp.where(real, pool(scores), -1.0))
        return top_k_mask(blocks, jnp.where(query_aware, low, wanted))

    columns, diagonals = jax.vmap(choose)(shares)
    return _Lines(columns, diagonals, query_aware)


def _choose(per_list, means, rows, tile, first, end, *, layout):
    """Blocks [tiles, num_blocks] that some query tiles of one list keep; see `each_list`."""
    lines, queries, least = per_list
    num_blocks = means.shape[0]
    keep = jnp.broadcast_to(lines.columns, (tile.shape[0], num_blocks))
    # Block j lies on diagonal own - j: each row of blocks is a slice of the reversed diagonals.
    reverse = jnp.pad(lines.diagonals[::-1], num_blocks)
    row = lambda own: jax.lax.dynamic_slice_in_dim(reverse, 2 * num_blocks - 1 - own, num_blocks)
    for later in range(cdiv(layout.block_q, layout.block_kv) + 1):
        own = first // layout.block_kv + later
        holds_row = own * layout.block_kv < jnp.minimum(first + layout.block_q, end)
        keep |= holds_row[:, None] & jax.vmap(row)(own)
    mapped = _map_bits(queries, means, tile, first, end, layout) >= least
    return keep | (lines.query_aware & mapped)


def _least_kept(queries, means, gamma, end, q_offset, layout):
    """Bits of the smallest map entry to keep [batch, kv_heads, lists], for the mass to be gamma.

    The map has as many entries as there are pairs of tiles, so it is computed anew for each of the
    few passes over it, some query tiles at a time, and never kept.
    """
    batch, kv_heads, num_lists, num_tiles, _ = queries.shape
    per_tile = batch * kv_heads * num_lists * means.shape[2]
    step = max(1, min(num_tiles, lists.ELEMENTS // per_tile))
    first = q_offset + jnp.arange(num_tiles) * layout.block_q
    real_tiles = jnp.sum(first[None, :] < end[:, None], axis=1)
    wanted = gamma * real_tiles[:, None, None]

    def one_list(queries, values, means, end, tile):
        first = q_offset + tile * layout.block_q
        bits = _map_bits(queries, means, tile, first, end, layout)
        entries = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return [jnp.sum(jnp.where(bits >= value, entries, 0.0)) for value in values]

    over_lists = jax.vmap(one_list, in_axes=(0, 0, None, None, None))
    over_kv_heads = jax.vmap(over_lists, in_axes=(0, 0, 0, None, None))
    over_batch = jax.vmap(over_kv_heads, in_axes=(0, 0, 0, 0, None))

    def enough(values):
        some_tiles = lambda number: over_batch(
            queries, values, means, end, number * step + jnp.arange(step)
        )
        mass = jax.lax.map(some_tiles, jnp.arange(cdiv(num_tiles, step)))
        return [jnp.sum(x, axis=0) >= wanted for x in mass]

    return largest_threshold(enough, wanted.shape)


def _map_bits(queries, means, tile, first, end, layout):
    """Softmax between query tiles and key blocks, as the floats' bits, 0 for later blocks."""
    queries = queries[jnp.minimum(tile, queries.shape[0] - 1)]
    last = jnp.minimum(first + layout.block_q, end)
    visible = (jnp.arange(means.shape[0])[None, :] * layout.block_kv < last[:, None]) & (
        first < end
    )[:, None]
    entries = _map(queries, means, visible)
    return jax.lax.bitcast_convert_type(entries, jnp.int32)


def _map(queries, means, visible):
    return masked_softmax(products(queries, means) * means.shape[1] ** -0.5, visible)


def _js_distance(p, q):
    """Square root of the Jensen-Shannon divergence, natural logarithm."""
    middle = (p + q) / 2

    def divergence(p):
        some = p > 0.0
        return jnp.sum(jnp.where(some, p * jnp.log(jnp.where(some, p / middle, 1.0)), 0.0))

    # Rounding may put the divergence of equal distributions below zero.
    return jnp.sqrt(jnp.maximum((divergence(p) + divergence(q)) / 2, 0.0))
