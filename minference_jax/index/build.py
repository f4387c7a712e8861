"""From one layer's patterns, queries and keys to the index of all its heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import block_sparse, dense, fallback, lines, tiles
from minference_jax.index.select import compact
from minference_jax.patterns import HeadPatterns, Kind
from pallas_kernels.block_sparse_attention.index import (
    ALIGNMENT,
    BlockSparseIndex,
    num_q_blocks,
    resolve_lengths,
)


def build_index(
    patterns: HeadPatterns,
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
    block_q: int,
    block_kv: int,
    last_q: int,
    dense_above: float | None = None,
    stagger: bool = False,
    line_scores: tuple[Array, Array] | None = None,
    first: Int[Array, " num_q_blocks"] | None = None,
    total: Callable[[Any], Any] = lambda of_heads: of_heads,
) -> BlockSparseIndex:
    """Estimates the sparse index of every head of one layer; jittable, O(N) memory for each head.

    Each head's entries hold up to three lists: the tiles of its distances, the tiles of everything
    (dense heads, and the last rows of tri-shape heads), and the tiles of its query blocks.

    Args:
        patterns: one layer's patterns (arrays [heads]).
        q: queries.
        k: keys.
        lengths: real keys of each batch row, kv_len if None.
        q_offset: position of the first query among the keys, kv_len - q_len if None.
        block_q: query rows of a tile.
        block_kv: keys of a tile.
        last_q: queries that vertical-slash heads estimate from.
        dense_above: a head that would execute more than this many times the tiles of dense
            attention becomes dense (see `fallback`); None keeps every list as it is.
        stagger: the tiles of lines start half a query tile later for the second half of its rows,
            so that lines are cut for half as many rows and cover fewer keys.
        line_scores: what `lines.last_query_scores` gives for these queries and keys, where it is
            known already; vertical-slash heads then look at nothing else of them.
        first: position of each query tile's first row, where q's tiles do not follow each other
            from q_offset on; all alike modulo 8, and `line_scores` must be known.
        total: sums arrays of heads over the devices that hold other query tiles of these prompts.

    Returns:
        The index, for `pallas_kernels.block_sparse_attention`; with `first`, for calls that take
        the tiles of consecutive rows.
    """
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
    blocks = {"block_q": block_q, "block_kv": block_kv}
    later = block_q // 2 if stagger else 0
    run = {"block_q": block_q - later, "block_kv": block_kv}
    rows = num_q_blocks(q_len, block_q)
    if first is None:
        first = q_offset + jnp.arange(rows) * block_q
    columns, column_count, near = _line_lists(
        patterns, q, k, lengths, q_offset, last_q, first[0] % ALIGNMENT, run, line_scores
    )

    everything, dense_count, dense_origin = dense.dense_lists(first, kv_len, **blocks)
    dense_count = dense_count[None, None, :]
    real = first[None, None, :] < lengths[:, None, None]
    reach = lambda entries: tiles.count_reaching(entries, dense_origin + later, block_kv)
    kind, last_size = (x[None, :, None] for x in (patterns.kind, patterns.last_size))
    reaches_end = (first + block_q)[None, None, :] > lengths[:, None, None] - last_size
    full = (kind == Kind.DENSE) | ((kind == Kind.TRI_SHAPE) & (last_size > 0) & reaches_end)
    capacity = near.shape[2]
    begin = jnp.where(full, capacity, 0)
    count = jnp.where(full, dense_count, jax.vmap(jax.vmap(reach))(near))
    origin = jnp.broadcast_to(dense_origin, begin.shape)
    shift = jnp.where(full, 0, later)
    entries = [near, jnp.broadcast_to(everything, (batch, heads, everything.shape[0]))]
    blocks_at = capacity + everything.shape[0]

    if patterns.max_blocks > 0:
        listed, listed_count = _block_lists(patterns, q, k, lengths, first, blocks)
        entries.append(listed.reshape(batch, heads, -1))
        is_block = kind == Kind.BLOCK_SPARSE
        begin = jnp.where(is_block, blocks_at + jnp.arange(rows) * listed.shape[3], begin)
        shift = jnp.where(is_block, 0, shift)
        count = jnp.where(is_block, listed_count, count)
        origin = jnp.where(is_block, 0, origin)
    count = jnp.where(real, count, 0)

    if dense_above is not None:
        executed = fallback.executed_tiles(
            count, columns, column_count, first + block_q - 1, block_kv
        )
        above = fallback.heads_above(executed, dense_count, dense_above, total)
        column_count = jnp.where(above, 0, column_count)
        above = above[:, :, None]
        begin = jnp.where(above, capacity, begin)
        count = jnp.where(above & real, dense_count, count)
        origin = jnp.where(above, dense_origin, origin)
        shift = jnp.where(above, 0, shift)

    return BlockSparseIndex(
        entries=jnp.concatenate(entries, axis=2),
        begin=begin.astype(jnp.int32),
        count=count.astype(jnp.int32),
        origin=origin.astype(jnp.int32),
        columns=columns,
        column_count=column_count,
        shift=shift.astype(jnp.int32) if stagger else None,
        **blocks,
    )


def _line_lists(patterns, q, k, lengths, q_offset, last_q, shift, run, scores):
    """Columns, their counts, and the tiles of the chosen distances, for every head.

    `run` holds `block_kv` and, as `block_q`, the rows that share one start of each tile; `shift` is
    the position of each query tile's first row modulo 8.
    """
    kv_len = k.shape[1]

    def estimate():
        vertical, slash = scores or lines.last_query_scores(
            q, k, lengths=lengths, q_offset=q_offset, last_q=last_q
        )
        return lines.choose_lines(vertical, slash, patterns, lengths=lengths)

    def take_first():
        return lines.forced_lines(patterns, kv_len, lengths=lengths)

    # Layers without vertical-slash heads skip the estimation at run time.
    searched = jnp.any(patterns.kind == Kind.VERTICAL_SLASH)
    vertical, distances = jax.lax.cond(searched, estimate, take_first)
    key = jnp.arange(kv_len, dtype=jnp.int32)

    def one_head(vertical, distances):
        columns = compact(key, vertical, patterns.max_columns, kv_len)
        entries = tiles.tiles_of_distances(distances, shift, **run)
        return columns, jnp.sum(vertical).astype(jnp.int32), entries

    return jax.vmap(jax.vmap(one_head))(vertical, distances)


def _block_lists(patterns, q, k, lengths, first, blocks):
    """Tiles of every query tile [batch, heads, num_q_blocks, max_tiles], and their counts."""
    batch, _, heads, _ = q.shape
    rows = first.shape[0]
    max_tiles = block_sparse.tiles_per_row(patterns.max_blocks, k.shape[1], **blocks)

    def estimate():
        return block_sparse.block_tiles(
            q, k, patterns.num_blocks, max_blocks=patterns.max_blocks, lengths=lengths,
            first=first, **blocks,
        )  # fmt: skip

    def nothing():
        return (
            jnp.zeros((batch, heads, rows, max_tiles), jnp.int32),
            jnp.zeros((batch, heads, rows), jnp.int32),
        )

    return jax.lax.cond(jnp.any(patterns.kind == Kind.BLOCK_SPARSE), estimate, nothing)
