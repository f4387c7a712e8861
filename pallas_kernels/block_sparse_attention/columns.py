"""Which gathered columns each query tile sees besides its key tiles: one bit for each.

A column inside one of the query tile's key tiles is covered: it must not count twice. Two ways to
find these columns, chosen at run time for all heads of a layer together:

* Query tiles of a head that share one list of distances differ only in where they begin, so whether
  a column is covered depends on its distance alone. One table of distances for each head answers
  for every pair of a query tile and a column.
* Any other lists: every key tile looks up which columns it covers, and marks the first of them and
  the one after the last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_sparse_attention.index import (
    ALIGNMENT,
    BlockSparseIndex,
    visits_everything,
)
from pallas_kernels.common.tiling import cdiv

# Columns whose bits share one word.
_WORD = 32

# Later than every key.
_NEVER = np.iinfo(np.int32).max

# Where lists are not shared, key tiles looked up at a time: of all query tiles together, which
# bounds memory, and of one query tile, which bounds what is done in vain for the shortest list.
_LOOKUPS = 2**21
_SLOTS = 64


def column_bits(
    index: BlockSparseIndex,
    ids: Int[Array, "batch heads padded_columns"],
    *,
    lengths: Int[Array, " batch"],
    first_row: Int[Array, " num_q_blocks"],
) -> tuple[
    Int[Array, "batch heads num_q_blocks words"],
    Int[Array, "batch heads num_q_blocks"],
    Int[Array, "batch heads num_q_blocks"],
]:
    """Bits of the columns that each query tile sees, and its tiles of `block_kv` columns.

    Args:
        index: the lists; `begin` lies within the entries.
        ids: the index's columns, padded to a multiple of `block_kv`.
        lengths: real keys of each batch row.
        first_row: position of each query tile's first row.

    Returns:
        For each half of the rows (one if the index is not staggered) a bit for each column, the
        first of 32 lowest in its word: set where the column is a key before the query tile's end
        that none of its key tiles holds. How many tiles of columns lie before every row or beyond
        the last set bit; how many tiles of columns reach to the last set bit.
    """
    slot = jnp.arange(ids.shape[2])[None, None, :]
    named = jnp.where(slot < index.column_count[..., None], ids, _NEVER)
    end = jnp.minimum(lengths[:, None], first_row[None, :] + index.block_q)
    over_heads = jax.vmap(_rank, in_axes=(0, None))
    visible = jax.vmap(over_heads)(named, end)
    early = jax.vmap(over_heads, in_axes=(0, None))(named, first_row + 1)

    shared = _find_shared(index, first_row, end)
    covered = lax.cond(
        shared.suffices,
        lambda: _covered_by_shared(index, shared, ids, first_row),
        lambda: _covered_by_any(index, named),
    )
    covered = jnp.where(shared.nothing[..., None, None], 0, covered)
    visible = jnp.where(shared.everything, 0, visible)
    word = jnp.arange(covered.shape[-1])[None, None, None, :]
    real = jnp.left_shift(1, jnp.clip(visible[..., None] - _WORD * word, 0, _WORD)) - 1
    bits = real[..., None, :] & ~covered
    either = bits[..., 0, :] | bits[..., -1, :]
    last = jnp.max(jnp.where(either != 0, _WORD * (word + 1) - lax.clz(either), 0), axis=-1)
    everything = -(-last // index.block_kv)
    full = jnp.where(last <= early, everything, jnp.minimum(early // index.block_kv, everything))
    return bits.reshape(*bits.shape[:3], -1), full, everything


def _rank(named: Int[Array, " columns"], key: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many of a head's columns lie before a key."""
    return jnp.searchsorted(named, key, method="scan_unrolled").astype(jnp.int32)


class _Shared(NamedTuple):
    """Each head's shared list of distances, and the query tiles that need none.

    Attributes:
        begin: its first entry.
        count: its entries.
        shift: how much later its tiles start for the second half of the rows.
        nothing: query tiles without key tiles.
        everything: query tiles whose key tiles hold all keys.
        suffices: every query tile of every head with columns is one of these, or takes from the
            shared list all tiles that reach key 0; and the table holds the distances of them all.
    """

    begin: Int[Array, "batch heads"]
    count: Int[Array, "batch heads"]
    shift: Int[Array, "batch heads"]
    nothing: Bool[Array, "batch heads num_q_blocks"]
    everything: Bool[Array, "batch heads num_q_blocks"]
    suffices: Bool[Array, ""]


def _find_shared(index, first_row, end) -> _Shared:
    """The list of each head's first query tile, compared with those of the others."""
    begin, count, origin, shift = index.begin, index.count, index.origin, index.later()
    at = lambda slot: jnp.take_along_axis(
        index.entries, jnp.clip(slot, 0, index.entries.shape[2] - 1), axis=2
    )
    same = begin == begin[..., :1]
    most = jnp.max(jnp.where(same, count, 0), axis=2)
    lacking = (count < most[..., None]) & (at(begin + count) + origin + shift + index.block_kv > 0)
    follows = same & (shift == shift[..., :1]) & ~lacking
    follows &= origin == (first_row // ALIGNMENT * ALIGNMENT)[None, None, :]
    nothing, everything = count == 0, visits_everything(index, end)
    known = follows | nothing | everything | (index.column_count == 0)[..., None]
    suffices = jnp.all(known) & (first_row[-1] <= _farthest(index))
    return _Shared(begin[..., 0], most, shift[..., 0], nothing, everything, suffices)


def _farthest(index):
    """Distance that the table goes to, from shapes alone.

    It takes in every key but where few rows of many keys have lists too short for all of them.
    """
    return max(index.begin.shape[2] * index.block_q, index.entries.shape[2] * index.block_kv)


def _covered_by_shared(index, shared: _Shared, ids, first_row):
    """Bits of covered columns [batch, heads, num_q_blocks, halves, words] from shared lists.

    Distances are in granules of 8 keys, from a column to the start of a query tile, plus the
    `step` granules of one query tile: columns inside it are not before its start.
    """
    step, width = index.block_q // ALIGNMENT, index.block_kv // ALIGNMENT
    capacity, tiles = index.entries.shape[2], index.begin.shape[2]
    rows = cdiv(_farthest(index) + index.block_kv, index.block_q) + 2
    size = rows * step

    def one_head(entries, begin, count, shift, ids):
        slot = jnp.arange(capacity)
        distance = step - entries // ALIGNMENT
        used = (slot >= begin) & (slot < begin + count) & (distance >= 0)
        marks = jnp.zeros((size,), jnp.uint8)
        marks = marks.at[jnp.where(used, distance, size)].set(1, mode="drop")
        table = lax.reduce_window(marks, np.uint8(0), lax.max, (width,), (1,), ((0, width - 1),))
        # What successive query tiles read for a column, side by side: neighbouring threads read
        # neighbouring bytes. Without the barrier XLA reads through the transpose instead.
        table = lax.optimization_barrier(table.reshape(rows, step).T.reshape(-1))

        # From each column to the first query tile, for each half of its rows.
        later = jnp.arange(index.halves) * (shift // ALIGNMENT)
        distance = step + first_row[0] // ALIGNMENT + later[:, None] - ids[None, :] // ALIGNMENT
        row, phase = jnp.divmod(distance, step)
        # Columns after a query tile read anything: it does not see them.
        at = (phase * rows + row)[:, :, None] + jnp.arange(tiles)[None, None, :]
        hits = table.at[at].get(mode="clip", wrap_negative_indices=False)
        octets = jnp.packbits(hits, axis=1, bitorder="little").transpose(2, 0, 1)
        return lax.bitcast_convert_type(octets.reshape(*octets.shape[:2], -1, 4), jnp.int32)

    return jax.vmap(jax.vmap(one_head))(
        index.entries, shared.begin, shared.count, shared.shift, ids
    )


def _covered_by_any(index, named):
    """Bits of covered columns [batch, heads, num_q_blocks, halves, words], whatever the lists."""
    words = named.shape[2] // _WORD
    half = jnp.arange(index.halves)[None, None, None, :]
    origin = index.origin[..., None] + half * index.later()[..., None]
    step = min(_SLOTS, max(1, _LOOKUPS // origin.size))
    count = jnp.where(index.column_count[..., None] > 0, index.count, 0)

    def one_tile(edges, slot, begin, count, origin, entries, named):
        at = jnp.minimum(begin + slot, entries.shape[0] - 1)
        start = origin + entries[at]
        # First column of each key tile, and the first after it.
        place = _rank(named, jnp.stack([start, start + index.block_kv], axis=1))
        used = (slot < count) & (place[:, 0] < place[:, 1])
        word = jnp.where(used[:, None], place // _WORD, words)
        bit = jnp.left_shift(1, place % _WORD)
        return edges.at[word, jnp.arange(2)[None, :]].add(bit, mode="drop")

    over_halves = jax.vmap(one_tile, in_axes=(0, None, None, None, 0, None, None))
    over_tiles = jax.vmap(over_halves, in_axes=(0, None, 0, 0, 0, None, None))
    over_heads = jax.vmap(over_tiles, in_axes=(0, None, 0, 0, 0, 0, 0))
    mark = jax.vmap(over_heads, in_axes=(0, None, 0, 0, 0, 0, 0))

    def some_slots(i, edges):
        slot = i * step + jnp.arange(step)
        return mark(edges, slot, index.begin, count, origin, index.entries, named)

    edges = jnp.zeros((*origin.shape, words, 2), jnp.int32)
    edges = lax.fori_loop(0, -(-jnp.max(count) // step), some_slots, edges)
    # A run of bits from `first` to before `end` is the number 2^end - 2^first. Of the words of the
    # sum, those into which a run goes on from the word before have lent it one.
    first, end = edges[..., 0], edges[..., 1]
    change = lax.population_count(first) - lax.population_count(end)
    return end - first - (jnp.cumsum(change, axis=-1) - change)
