"""The plan of a launch against the index's definition, column by column in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_attention import BlockSparseIndex, columns
from pallas_kernels.block_sparse_attention.index import NO_TILE, validate
from pallas_kernels.block_sparse_attention.plan import make_plan

# Small query tiles: more of them for the same work.
BLOCK_Q, TILES, NUM_COLUMNS = 32, 12, 70
CAPACITY = 128

# Lists of distances of which each query tile takes all that reach key 0, or none, or every key.
SHARED = ("lines", "uncut", "dense", "tri-shape", "empty", "padded")
KINDS = (*SHARED, "trimmed", "blocks", "uneven", "moved")


def descending(rng, first, last, block_kv):
    """Starts of disjoint tiles, multiples of 8, from `first` down to `last`; at times none."""
    starts, at = [], first - 8 * int(rng.integers(0, 9))
    chance = rng.choice([0.0, 0.2, 0.8])
    while at >= last:
        if rng.random() < chance:
            starts.append(at)
        at -= block_kv + 8 * int(rng.integers(0, 4))
    return np.array(starts[: CAPACITY // 2], int)


def random_head(rng, kind, *, q_offset, shift, block_kv):
    """Entries, and begin, count, origin and shift of each query tile of one head."""
    first = q_offset + BLOCK_Q * np.arange(TILES)
    origin, end = first // 8 * 8, first[-1] + BLOCK_Q
    begin, shifts = np.zeros(TILES, int), np.full(TILES, shift)
    near = descending(rng, BLOCK_Q, -end - 2 * block_kv, block_kv)
    everything = BLOCK_Q + 8 - block_kv * np.arange(1, (end + 2 * block_kv) // block_kv + 1)
    reach = lambda entries, later: (origin[:, None] + later + entries[None, :] + block_kv > 0).sum(
        axis=1
    )
    entries, count = near, reach(near, shift)
    switched = np.arange(TILES) >= rng.integers(0, TILES)
    match kind:
        case "dense":
            entries, shifts, count = everything, shifts * 0, reach(everything, 0)
        case "uncut":
            count = np.full(TILES, len(near))
        case "empty":
            count = count * 0
        case "padded":
            count = np.where(switched, 0, count)
        case "trimmed":
            count = np.minimum(count, rng.integers(0, len(near) + 1, TILES))
        case "tri-shape":
            entries = np.concatenate([near, everything])
            begin, shifts = np.where(switched, len(near), 0), np.where(switched, 0, shift)
            count = np.where(switched, reach(everything, 0), count)
        case "blocks":
            starts = [descending(rng, x + BLOCK_Q, -2 * block_kv, block_kv)[:8] for x in origin]
            count, origin = np.array([len(x) for x in starts]), origin * 0
            begin = np.cumsum(count) - count
            entries = np.concatenate(starts)
            shifts = 8 * rng.integers(0, shift // 8 + 1, TILES)
        case "uneven":
            shifts = 8 * rng.integers(0, shift // 8 + 1, TILES)
        case "moved":
            origin = origin + 8 * rng.integers(-3, 4, TILES)
            count = reach(near, shift)
    padded = np.full(CAPACITY, NO_TILE)
    padded[: len(entries)] = entries
    return padded, begin, count, origin, shifts


def random_index(rng, kinds, *, batch, q_offset, staggered, block_kv):
    shift = BLOCK_Q // 2 if staggered else 0
    head = functools.partial(random_head, q_offset=q_offset, shift=shift, block_kv=block_kv)
    made = [[head(rng, kind) for kind in kinds] for _ in range(batch)]
    entries, begin, count, origin, shifts = (
        jnp.asarray(np.array([[h[i] for h in row] for row in made]), jnp.int32) for i in range(5)
    )
    # Columns beyond the last key, and anything in the slots that are not used.
    shape = (batch, len(kinds))
    pool = rng.choice([60, 200, 2 * q_offset + BLOCK_Q * TILES + 100])
    ids = rng.integers(-(2**31), 2**31, (*shape, NUM_COLUMNS))
    column_count = rng.integers(0, min(NUM_COLUMNS, pool) + 1, shape)
    for where in np.ndindex(*shape):
        chosen = rng.choice(pool, column_count[where], replace=False)
        ids[where][: len(chosen)] = np.sort(chosen)
    return BlockSparseIndex(
        entries=entries, begin=begin, count=count, origin=origin,
        columns=jnp.asarray(ids, jnp.int32), column_count=jnp.asarray(column_count, jnp.int32),
        block_q=BLOCK_Q, block_kv=block_kv, shift=shifts if staggered else None,
    )  # fmt: skip


def visible_columns(index, lengths, q_offset):
    """Which columns each half of a query tile sees [batch, heads, tiles, halves, columns]."""
    arrays = (index.entries, index.begin, index.count, index.origin, index.later(), index.columns)
    entries, begin, count, origin, shift, ids = map(np.asarray, arrays)
    seen = np.zeros((*begin.shape, index.halves, ids.shape[2]), bool)
    for b, h, tile, half in np.ndindex(*seen.shape[:4]):
        at = begin[b, h, tile]
        start = entries[b, h, at : at + count[b, h, tile]] + origin[b, h, tile]
        start = start + half * shift[b, h, tile]
        key = ids[b, h].astype(int)
        inside = (key[:, None] >= start) & (key[:, None] < start + index.block_kv)
        end = min(lengths[b], q_offset + (tile + 1) * BLOCK_Q)
        named = np.arange(len(key)) < index.column_count[b, h]
        seen[b, h, tile, half] = named & (key < end) & ~inside.any(axis=1)
    return seen


def unpacked(words, halves):
    """The bits of words, lowest first [..., halves, columns]."""
    bits = (np.asarray(words)[..., None] >> np.arange(32)) & 1
    return bits.reshape(*bits.shape[:3], halves, -1).astype(bool)


@jax.jit
def planned(index, lengths, q_offset):
    return make_plan(index, lengths=lengths, q_offset=q_offset)


@jax.jit
def uses_shared_lists(index, lengths, q_offset):
    first_row = q_offset + BLOCK_Q * jnp.arange(TILES)
    end = jnp.minimum(lengths[:, None], first_row[None, :] + BLOCK_Q)
    return columns._find_shared(index, first_row, end).suffices


def check_tiles(index, lists, lengths):
    """Masked tiles are those that hold a key before 0, after a row or from `length` on."""
    entries = np.asarray(index.entries)
    begin, count, origin, shift, front, tail, first_row, length = np.moveaxis(lists, -1, 0)[:8]
    kept = (index.begin, index.count, index.origin, index.later())
    for got, want in zip((begin, count, origin, shift), kept, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        length, np.broadcast_to(np.reshape(lengths, (-1, 1, 1)), begin.shape)
    )
    for where in np.ndindex(*begin.shape):
        at = slice(begin[where], begin[where] + count[where])
        start = origin[where] + entries[where[:2]][at]
        end = start + index.block_kv
        early = start < 0
        late = ((end > first_row[where] + 1) | (end + shift[where] > length[where])) & ~early
        assert tail[where] == early.sum()
        # One at least, for the pipeline's first item.
        assert front[where] == max(late.sum(), tail[where] == 0)


def check(index, lengths, q_offset):
    """Every field of the plan against the definition."""
    validate(index)
    plan = planned(index, jnp.asarray(lengths, jnp.int32), jnp.int32(q_offset))
    check_tiles(index, np.asarray(plan.lists), lengths)
    want = visible_columns(index, lengths, q_offset)
    got = unpacked(plan.column_bits, index.halves)
    np.testing.assert_array_equal(got[..., :NUM_COLUMNS], want)
    assert not got[..., NUM_COLUMNS:].any()
    # Tiles of columns: all that hold a bit, and first those that no row's position cuts.
    full, everything = np.moveaxis(np.asarray(plan.lists)[..., 8:], -1, 0)
    tile = np.arange(NUM_COLUMNS) // index.block_kv
    any_half = want.any(axis=3)
    np.testing.assert_array_equal(everything, np.where(any_half, tile + 1, 0).max(axis=-1))
    first_row = q_offset + BLOCK_Q * np.arange(TILES)
    np.testing.assert_array_equal(plan.lists[0, 0, :, 6], first_row)
    ids, used = np.asarray(index.columns), np.arange(NUM_COLUMNS)
    before = ids[:, :, None, :] <= first_row[:, None]
    before &= used < np.asarray(index.column_count)[..., None, None]
    assert not (any_half & ~before & (tile < full[..., None])).any()
    assert (full >= np.minimum(before.sum(axis=-1) // index.block_kv, everything)).all()
    assert (full <= everything).all()
    assert (full == everything)[(any_half <= before).all(axis=-1)].all()


@pytest.mark.parametrize(
    ("block_kv", "staggered"), [(64, True), (96, False), (96, True), (128, True)]
)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.one_of(
        st.lists(st.sampled_from(SHARED), min_size=4, max_size=4),
        st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
    ),
    q_offset=st.sampled_from([0, 3, 16, 133, 500]),
    lengths=st.lists(st.integers(1, 500 + BLOCK_Q * TILES), min_size=2, max_size=2),
)
def test_columns_equal_the_definition(block_kv, staggered, seed, kinds, q_offset, lengths):
    index = random_index(
        np.random.default_rng(seed), kinds, batch=2, q_offset=q_offset, staggered=staggered,
        block_kv=block_kv,
    )  # fmt: skip
    if set(kinds) <= set(SHARED):
        assert uses_shared_lists(index, jnp.asarray(lengths, jnp.int32), jnp.int32(q_offset))
    check(index, lengths, q_offset)


@pytest.mark.parametrize("kind", ["trimmed", "uneven", "moved", "lines"])
def test_distances_alone_do_not_say_what_is_covered(kind):
    """Shared lists all the same, but not every query tile's, or (lines) too far for the table."""
    q_offset = 20_001 if kind == "lines" else 133
    lengths = [q_offset + 380, q_offset + 200]
    index = random_index(
        np.random.default_rng(0), [kind] * 4, batch=2, q_offset=q_offset, staggered=True,
        block_kv=96,
    )  # fmt: skip
    assert not uses_shared_lists(index, jnp.asarray(lengths, jnp.int32), jnp.int32(q_offset))
    check(index, lengths, q_offset)
