"""What each pattern visits, against the brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minference_jax as mj
from minference_jax.index import lines as line_index
from minference_jax.index.select import compact, top_k_mask
from minference_jax.index.tiles import tiles_of_distances
from pallas_kernels.block_sparse_attention.index import validate
from tests.core import brute_force
from tests.helpers import causal_mask, random_qkv

HEADS, KV_HEADS = 4, 2

# q_len, kv_len, block_q, block_kv, stagger; few, because each is a program of its own.
SHAPES = [
    (1, 1, 16, 16, False),
    (100, 100, 16, 16, False),
    (45, 130, 32, 64, False),
    (150, 150, 64, 32, False),
    (101, 101, 16, 32, True),
    (101, 205, 32, 96, True),
]

sizes = st.integers(0, 160)
patterns = st.one_of(
    st.just(mj.Dense()),
    st.builds(mj.AShape, sink_size=sizes, window_size=st.integers(1, 160)),
    st.builds(mj.TriShape, sink_size=sizes, window_size=st.integers(1, 160), last_size=sizes),
    st.builds(
        mj.VerticalSlash,
        vertical_size=sizes,
        slash_size=st.integers(1, 160),
        sink_size=st.integers(0, 8),
        window_size=st.integers(1, 8),
    ),
    st.builds(mj.BlockSparse, num_blocks=st.integers(1, 4)),
)


@functools.cache
def masker(shape):
    """One compiled program for a shape: (patterns, q, k, lengths) -> index and mask."""
    q_len, kv_len, block_q, block_kv, stagger = shape

    @jax.jit
    def run(patterns, q, k, lengths):
        index = mj.build_index(
            patterns, q, k, lengths=lengths, block_q=block_q, block_kv=block_kv, last_q=64,
            stagger=stagger,
        )  # fmt: skip
        return index, index.to_mask(q_len, kv_len, lengths=lengths)

    return run


def expected_mask(pattern, q, k, *, length, shape):
    """One head: q [q_len, d], k [kv_len, d]."""
    q_len, kv_len, block_q, block_kv, stagger = shape
    offset = kv_len - q_len
    blocks = {"block_q": block_q, "block_kv": block_kv}
    run = block_q // 2 if stagger else block_q  # rows that share the tiles of lines
    lines = functools.partial(
        brute_force.mask_of_lines,
        q_len=q_len, kv_len=kv_len, offset=offset, length=length, block_q=run, block_kv=block_kv,
    )  # fmt: skip
    causal = causal_mask(q_len, kv_len) & (np.arange(kv_len) < length)
    match pattern:
        case mj.Dense():
            return causal
        case mj.BlockSparse():
            return brute_force.mask_of_blocks(
                q, k, -(-pattern.num_blocks * 64 // block_kv), offset=offset, length=length,
                **blocks,
            )  # fmt: skip
        case mj.VerticalSlash():
            vertical, slash = brute_force.last_query_sums(q, k, offset=offset, length=length)
            columns = brute_force.largest(vertical, pattern.sink_size, pattern.vertical_size)
            distances = brute_force.largest(slash, pattern.window_size, pattern.slash_size)
            return lines(columns, distances | {0})
        case mj.AShape() | mj.TriShape():
            columns = set(range(min(pattern.sink_size, length)))
            mask = lines(columns, set(range(min(pattern.window_size, length))))
            if isinstance(pattern, mj.TriShape) and pattern.last_size:
                tile_end = offset + (np.arange(q_len) // block_q + 1) * block_q
                dense = tile_end > length - pattern.last_size
                mask = np.where(dense[:, None], causal, mask)
            return mask


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    heads=st.lists(patterns, min_size=HEADS, max_size=HEADS),
    cut=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_visited_mask_equals_brute_force(shape, heads, cut, seed):
    q_len, kv_len = shape[:2]
    lengths = np.array([kv_len, max(kv_len - q_len + 1, kv_len - cut)])
    q, k, _ = random_qkv(seed, batch=2, q_len=q_len, kv_len=kv_len, heads=HEADS, kv_heads=KV_HEADS)
    layer = mj.HeadPatterns.from_grid([heads], max_columns=256, max_blocks=4)
    index, mask = masker(shape)(
        jax.tree.map(lambda x: x[0], layer), jnp.asarray(q), jnp.asarray(k), jnp.asarray(lengths)
    )
    validate(index)
    for b, h in np.ndindex(2, HEADS):
        want = expected_mask(
            heads[h], q[b, :, h], k[b, :, h // 2], length=int(lengths[b]), shape=shape
        )
        real = int(lengths[b]) - (kv_len - q_len)
        np.testing.assert_array_equal(
            mask[b, h, :real], want[:real], err_msg=f"row {b}, {heads[h]}"
        )


cut_into_tiles = jax.jit(tiles_of_distances, static_argnames=("block_q", "block_kv"))


@pytest.mark.parametrize("block_kv", [64, 96])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.integers(0, 7))
def test_slashes_are_complete_but_for_four_rows_of_a_tile(block_kv, seed, shift):
    rng = np.random.default_rng(seed)
    kv_len, block_q = 512, 64
    chosen = np.zeros(kv_len, bool)
    chosen[rng.choice(kv_len, size=int(rng.integers(1, 40)), replace=False)] = True
    entries = np.asarray(
        cut_into_tiles(jnp.asarray(chosen), jnp.int32(shift), block_q=block_q, block_kv=block_kv)
    )
    starts = entries[entries > -(2**30)]
    visited = np.zeros((block_q, 2 * kv_len), bool)  # row, distance + kv_len
    for start in starts:
        for row in range(block_q):
            distance = shift + row - np.arange(start, start + block_kv)
            visited[row, distance[np.abs(distance) < kv_len] + kv_len] = True
    assert visited[:, kv_len].all(), "a row must see itself"
    missed = (~visited[:, kv_len:][:, chosen]).sum(axis=0)
    assert missed.max() <= 4


def test_isolated_slash_costs_one_tile():
    chosen = np.zeros(4096, bool)
    chosen[[0, 1001, 3003]] = True
    entries = np.asarray(
        cut_into_tiles(jnp.asarray(chosen), jnp.int32(0), block_q=128, block_kv=128)
    )
    assert (entries > -(2**30)).sum() == 3


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(
        st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 7.0, np.inf, -1.0]), min_size=24, max_size=24
    ),
    k=st.integers(0, 30),
)
def test_top_k_mask_takes_the_largest_and_breaks_ties_by_position(scores, k):
    scores = np.array(scores, np.float32)
    allowed = np.flatnonzero(scores >= 0)
    order = allowed[np.argsort(-scores[allowed], kind="stable")]
    want = np.zeros(24, bool)
    want[order[:k]] = True
    np.testing.assert_array_equal(jax.jit(top_k_mask)(jnp.asarray(scores), jnp.int32(k)), want)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (130, 64), (700, 5), (1000, 7), (1024, 8)])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.5, 1.0])
def test_compact_keeps_the_marked_values_in_order(n, size, share):
    mask = np.random.default_rng(n).random(n) < share
    want = np.full(size, -7)
    kept = np.flatnonzero(mask)[:size] * 3
    want[: len(kept)] = kept
    got = compact(jnp.arange(n, dtype=jnp.int32) * 3, jnp.asarray(mask), size, -7)
    np.testing.assert_array_equal(got, want)


def test_block_sparse_breaks_ties_by_position():
    shape = (256, 256, 32, 32, False)
    zeros = jnp.zeros((1, 256, 2, 16))
    layer = mj.HeadPatterns.from_grid([[mj.BlockSparse(num_blocks=2)] * 2], max_blocks=4)
    layer = jax.tree.map(lambda x: x[0], layer)
    mask = masker(shape)(layer, zeros, zeros, jnp.array([256]))[1]
    want = np.zeros((256, 256), bool)
    for tile in range(8):
        rows = slice(32 * tile, 32 * tile + 32)
        want[rows, 32 * tile : 32 * tile + 32] = True
        want[rows, :96] = True
    np.testing.assert_array_equal(mask[0, 0], want & causal_mask(256, 256))


def test_bigger_budgets_visit_more():
    q, k, _ = map(jnp.asarray, random_qkv(2, q_len=200, heads=1, kv_heads=1))
    masks = []
    for budget in (10, 40, 80, 200):
        pattern = mj.VerticalSlash(vertical_size=budget, slash_size=budget)
        layer = mj.HeadPatterns.from_grid([[pattern]], max_columns=256)
        layer = jax.tree.map(lambda x: x[0], layer)
        mask = masker((200, 200, 16, 16, False))(layer, q, k, jnp.array([200]))[1]
        masks.append(np.asarray(mask[0, 0]))
    requested = [np.trace(mask) for mask in masks]
    assert requested == [200] * 4, "every row sees itself"
    assert masks[0].sum() < masks[1].sum() < masks[2].sum() < masks[3].sum()
    np.testing.assert_array_equal(masks[3], causal_mask(200, 200))


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(mj.VerticalSlash(vertical_size=64, slash_size=200), id="vertical-slash"),
        pytest.param(mj.BlockSparse(num_blocks=32), id="block-sparse"),
        pytest.param(mj.Dense(), id="dense"),
    ],
)
def test_memory_does_not_grow_with_the_square(pattern):
    def bytes_at(length):
        layer = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=2)
        shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (2, 1, 1)]
        attend = mj.SparseAttention(layer).layer(0)
        return jax.jit(attend).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    # A single [N, N] mask of one head at 16K would add 268 MB of booleans.
    assert bytes_at(16384) < 2.3 * bytes_at(8192) < 100e6


def test_sums_of_many_last_queries_are_those_of_all_at_once(monkeypatch):
    q, k, _ = map(jnp.asarray, random_qkv(5, q_len=90, kv_len=140, heads=2, kv_heads=1))
    lengths, q_offset = jnp.array([133]), jnp.int32(50)
    monkeypatch.setattr(line_index, "LAST_Q", 16)
    got = line_index.last_query_scores(q, k, lengths=lengths, q_offset=q_offset, last_q=40)
    for head in range(2):
        want = brute_force.last_query_sums(
            np.asarray(q[0, :, head]), np.asarray(k[0, :, 0]), offset=50, length=133, last_q=40
        )
        for sums, of_head in zip(got, want, strict=True):
            np.testing.assert_allclose(sums[0, head, : len(of_head)], of_head, atol=1e-5)
