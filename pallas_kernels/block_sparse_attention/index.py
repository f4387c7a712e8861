"""The index: which key tiles and which single keys each query tile visits."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.environment import on_cpu
from pallas_kernels.common.tiling import cdiv

# Hopper's bulk copies into swizzled shared memory start at multiples of 8 rows.
ALIGNMENT = 8

# Filler of unused list entries: as a distance or as a start it lies before every key.
NO_TILE = -(2**30)

# Numbers held at a time while visited pairs are counted: 4 MB, a few steps for each layer at 128K.
_COUNTED = 2**20


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparseIndex:
    """Key tiles and key columns for each (batch row, head, query tile of `block_q` rows).

    Query tile i visits the tiles that start at `origin[i] + entries[begin[i] + j]` for j in
    `0..count[i]-1`, each `block_kv` keys long. A list whose entries are (negative) distances is
    shared by every query tile of a head: `origin` is then the position of the tile's first row,
    rounded down to a multiple of ALIGNMENT. A list of absolute starts has origin 0. Besides, each
    row sees the single keys `columns[:column_count]` of its head. A key counts once however often
    it is named, only real keys (0 <= key < length) count, and only those at or before the row.

    Invariants: starts of one query tile are strictly descending, at least `block_kv` apart (tiles
    are disjoint) and multiples of ALIGNMENT; columns strictly ascend. `validate` checks them. No
    list is longer than one whose tiles all hold a key that could be before its last row.

    Attributes:
        entries: int32 [batch, heads, capacity]; unused entries are NO_TILE.
        begin: int32 [batch, heads, num_q_blocks], first entry of the query tile.
        count: int32 [batch, heads, num_q_blocks], entries of the query tile.
        origin: int32 [batch, heads, num_q_blocks], added to each entry.
        columns: int32 [batch, heads, num_columns]; entries from column_count on are ignored.
        column_count: int32 [batch, heads].
        block_q: query rows of one tile (static).
        block_kv: keys of one tile (static).
        shift: int32 [batch, heads, num_q_blocks] or None: how many keys later the tiles of the
            second half of the query tile's rows start; a multiple of ALIGNMENT, at most
            block_q / 2, and block_q / 2 where the lists are of distances. None: none later.
    """

    entries: Int[Array, "batch heads capacity"]
    begin: Int[Array, "batch heads num_q_blocks"]
    count: Int[Array, "batch heads num_q_blocks"]
    origin: Int[Array, "batch heads num_q_blocks"]
    columns: Int[Array, "batch heads num_columns"]
    column_count: Int[Array, "batch heads"]
    block_q: int = dataclasses.field(metadata={"static": True})
    block_kv: int = dataclasses.field(metadata={"static": True})
    shift: Int[Array, "batch heads num_q_blocks"] | None = None

    @property
    def staggered(self) -> bool:
        """Whether the two halves of a query tile's rows may visit different keys."""
        return self.shift is not None

    @property
    def halves(self) -> int:
        """Parts of a query tile's rows whose tiles may differ."""
        return 2 if self.staggered else 1

    @property
    def stage_rows(self) -> int:
        """Keys from the first to the last that any row of a query tile sees of a tile."""
        return self.block_kv + (self.block_q // 2 if self.staggered else 0)

    def later(self) -> Int[Array, "batch heads num_q_blocks"]:
        """The shift, 0 where there is none."""
        return jnp.zeros_like(self.origin) if self.shift is None else self.shift

    def density(
        self,
        q_len: int,
        kv_len: int,
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch heads"]:
        """Fraction of the causal (query, key) pairs of real rows that the index visits."""
        pairs = self.visited_pairs(q_len, kv_len, lengths=lengths, q_offset=q_offset)
        return pairs[0] / jnp.maximum(pairs[1], 1.0)

    def visited_pairs(
        self,
        q_len: int,
        kv_len: int,
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch heads"], Float[Array, "batch heads"]]:
        """How many (query, key) pairs of real rows are visited, and how many are causal.

        Some query tiles at a time, so that memory does not grow with the square of the length.
        """
        batch, heads = self.begin.shape[:2]
        lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)

        part = self.block_q // self.halves
        most = min(_longest_list(kv_len, self.block_q, self.block_kv), self.entries.shape[2])
        at_once = max(1, _COUNTED // (batch * heads * max(most, self.columns.shape[2])))
        if on_cpu():
            at_once = 1  # XLA takes minutes to compile several for a CPU, which gains nothing

        def one_head(entries, begin, count, origin, shift, columns, column_count, length):
            def one_part(half, number, begin, count, origin, shift):
                origin = origin + half * shift
                first = q_offset + number * self.block_q + half * part
                rows = jnp.clip(jnp.minimum(length, q_offset + q_len) - first, 0, part)
                start = origin + _list_of(entries, begin, count, most)
                low = jnp.maximum(start, 0)
                width = start + self.block_kv - low
                tiles = _sum_clipped(first + 1 - low, rows, jnp.maximum(width, 0))
                covered = covered_columns(entries, begin, count, origin, columns, self.block_kv)
                use = (jnp.arange(columns.shape[0]) < column_count) & ~covered
                singles = jnp.where(use, jnp.clip(first + rows - columns, 0, rows), 0)
                causal = rows * first + rows * (rows + 1) // 2
                pairs = jnp.sum(tiles.astype(jnp.float32)) + jnp.sum(singles.astype(jnp.float32))
                return pairs, causal.astype(jnp.float32)

            def one_tile(tile):
                parts = [one_part(half, *tile) for half in range(self.halves)]
                return jax.tree.map(lambda *x: sum(x), *parts)

            tiles = (jnp.arange(begin.shape[0]), begin, count, origin, shift)
            step = min(at_once, begin.shape[0])
            pairs, causal = jax.lax.map(one_tile, tiles, batch_size=step if step > 1 else None)
            return jnp.sum(pairs), jnp.sum(causal)

        over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, 0, 0, 0, 0, None))
        return jax.vmap(over_heads)(
            self.entries, self.begin, self.count, self.origin, self.later(), self.columns,
            self.column_count, lengths,
        )  # fmt: skip

    def to_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> Bool[Array, "batch heads q_len kv_len"]:
        """The exact visited mask; for tests and pictures (memory grows with q_len * kv_len)."""
        batch = self.entries.shape[0]
        lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
        key = jnp.arange(kv_len)

        def one_head(entries, begin, count, origin, shift, columns, column_count, length):
            def one_part(half, begin, count, origin, shift):
                return visited_keys(
                    entries, begin, count, origin + half * shift, columns, column_count,
                    kv_len=kv_len, block_q=self.block_q, block_kv=self.block_kv,
                )  # fmt: skip

            def one_tile(tile):
                return jnp.stack([one_part(half, *tile) for half in range(self.halves)])

            tiles = jax.lax.map(one_tile, (begin, count, origin, shift))
            tiles = tiles.reshape(-1, kv_len)
            rows = jnp.repeat(tiles, self.block_q // self.halves, axis=0)[:q_len]
            position = q_offset + jnp.arange(q_len)
            causal = key[None, :] <= position[:, None]
            return rows & causal & (key < length)[None, :]

        over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, 0, 0, 0, 0, None))
        return jax.vmap(over_heads)(
            self.entries, self.begin, self.count, self.origin, self.later(), self.columns,
            self.column_count, lengths,
        )  # fmt: skip


def resolve_lengths(
    batch: int,
    q_len: int,
    kv_len: int,
    lengths: Int[Array, " batch"] | None,
    q_offset: Int[Array, ""] | int | None,
) -> tuple[Int[Array, " batch"], Int[Array, ""]]:
    """Fills the defaults: every key real, queries aligned to the end of the keys."""
    if lengths is None:
        lengths = jnp.full((batch,), kv_len, jnp.int32)
    offset = kv_len - q_len if q_offset is None else q_offset
    return lengths.astype(jnp.int32), jnp.asarray(offset, jnp.int32)


def visited_keys(
    entries: Int[Array, " capacity"],
    begin: Int[Array, ""],
    count: Int[Array, ""],
    origin: Int[Array, ""],
    columns: Int[Array, " num_columns"],
    column_count: Int[Array, ""],
    *,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> Bool[Array, " kv_len"]:
    """Keys that the tiles and columns of one head's query tile name, future keys included."""
    most = _longest_list(kv_len, block_q, block_kv)
    start = origin + _list_of(entries, begin, count, most)
    edges = jnp.zeros((kv_len + 1,), jnp.int32)
    edges = edges.at[jnp.clip(start, 0, kv_len)].add(1)
    edges = edges.at[jnp.clip(start + block_kv, 0, kv_len)].add(-1)
    wanted = jnp.where(jnp.arange(columns.shape[0]) < column_count, columns, kv_len)
    return (jnp.cumsum(edges)[:kv_len] > 0).at[wanted].set(True, mode="drop")


def _longest_list(kv_len: int, block_q: int, block_kv: int) -> int:
    """No list of disjoint tiles that hold a key at or before a query tile's rows is longer."""
    return cdiv(kv_len + block_q, block_kv) + 2


def _list_of(entries: Array, begin: Array, count: Array, most: int) -> Array:
    """One query tile's entries [at most `most`], NO_TILE where there are fewer."""
    slot = jnp.arange(min(most, entries.shape[0]))
    entry = entries[jnp.minimum(begin + slot, entries.shape[0] - 1)]
    return jnp.where(slot < count, entry, NO_TILE)


def covered_columns(
    entries: Int[Array, " capacity"],
    begin: Int[Array, ""],
    count: Int[Array, ""],
    origin: Int[Array, ""],
    columns: Int[Array, " num_columns"],
    block_kv: int,
) -> Bool[Array, " num_columns"]:
    """Which columns lie inside a tile of one head's query tile."""
    after = tiles_after(entries, begin, count, origin, columns)
    at = jnp.minimum(begin + after, entries.shape[0] - 1)
    return (after < count) & (columns < origin + entries[at] + block_kv)


def tiles_after(
    entries: Int[Array, " capacity"],
    begin: Int[Array, " *#shape"],
    count: Int[Array, " *#shape"],
    origin: Int[Array, " *#shape"],
    key: Int[Array, " *#shape"],
) -> Int[Array, " *#shape"]:
    """How many tiles of a query tile start after a key, by binary search (starts descend)."""
    capacity = entries.shape[0]
    found = jnp.zeros(jnp.broadcast_shapes(jnp.shape(begin), jnp.shape(key)), jnp.int32)
    for bit in reversed(range(capacity.bit_length())):
        more = found + (1 << bit)
        start = origin + entries[jnp.clip(begin + more - 1, 0, capacity - 1)]
        found = jnp.where((more <= count) & (start > key), more, found)
    return found


def visits_everything(
    index: BlockSparseIndex, end: Int[Array, "#batch num_q_blocks"]
) -> Bool[Array, "batch heads num_q_blocks"]:
    """Whether the key tiles of each query tile hold, without a gap, all keys before `end`."""
    at = lambda slot: jnp.take_along_axis(
        index.entries, jnp.clip(slot, 0, index.entries.shape[2] - 1), axis=2
    )
    nearest, farthest = at(index.begin), at(index.begin + index.count - 1)
    gapless = nearest - farthest == (index.count - 1) * index.block_kv
    reaches = index.origin + nearest + index.block_kv >= end[:, None, :]
    begins = index.origin + index.later() + farthest <= 0
    return (index.count > 0) & gapless & reaches & begins


def validate(index: BlockSparseIndex) -> None:
    """Checks the invariants of an index made outside this library, on the host.

    Raises:
        ValueError: shapes disagree, tiles of one query tile overlap or do not descend (a key would
            count twice), a start is not a multiple of 8, or columns do not ascend.
    """
    entries, begin, count, origin, columns, column_count = (
        np.asarray(x)
        for x in (
            index.entries, index.begin, index.count, index.origin, index.columns,
            index.column_count,
        )
    )  # fmt: skip
    if begin.shape != count.shape or begin.shape != origin.shape:
        raise ValueError(
            "`begin`, `count` and `origin` must have one shape [batch, heads, num_q_blocks], got "
            f"{begin.shape}, {count.shape} and {origin.shape}"
        )
    if entries.shape[:2] != begin.shape[:2] or columns.shape[:2] != begin.shape[:2]:
        raise ValueError(
            f"`entries` {entries.shape} and `columns` {columns.shape} must agree with `begin` "
            f"{begin.shape} in batch and heads"
        )
    for where in np.ndindex(*begin.shape):
        first, number = begin[where], count[where]
        if first < 0 or number < 0 or first + number > entries.shape[-1]:
            raise ValueError(
                f"query tile {where}: entries {first}..{first + number} are outside the list of "
                f"{entries.shape[-1]}"
            )
        starts = origin[where] + entries[where[:2]][first : first + number]
        if np.any(starts % ALIGNMENT):
            raise ValueError(f"query tile {where}: tile starts must be multiples of {ALIGNMENT}")
        if np.any(starts[:-1] - starts[1:] < index.block_kv):
            raise ValueError(
                f"query tile {where}: tiles must descend and be disjoint (at least "
                f"{index.block_kv} apart), got starts {starts.tolist()}; merge duplicates first"
            )
    for where in np.ndindex(*column_count.shape):
        used = columns[where][: column_count[where]]
        if np.any(used[1:] <= used[:-1]) or np.any(used < 0):
            raise ValueError(
                f"columns of (batch, head) {where} must be >= 0 and strictly ascending"
            )


def num_q_blocks(q_len: int, block_q: int) -> int:
    """Query tiles that cover q_len rows."""
    return cdiv(q_len, block_q)


def _sum_clipped(first: Array, rows: Array, width: Array) -> Array:
    """Sum of clip(first + t, 0, width) over t in 0..rows-1, elementwise, in closed form."""

    def total(x):  # sum of clip(y, 0, width) over y <= x
        inside = jnp.clip(x, 0, width)
        return inside * (inside + 1) // 2 + jnp.maximum(x - width, 0) * width

    return total(first + rows - 1) - total(first - 1)
