"""What stays of a layer's keys: SnapKV, PyramidKV and StreamingLLM against numpy brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.kv_cache import PyramidKV, SnapKV, StreamingKV
from minference_jax.kv_cache.snap_kv import keep_voted
from tests import helpers

N, LENGTHS = 61, [61, 38, 5]


def random_qkv(seed, **sizes):
    return [jnp.asarray(x) for x in helpers.random_qkv(seed, **sizes)]


def voted(q, k, *, budget, window, kernel_size, pooling):
    """Positions that one key/value head keeps: q [n, group, d], k [n, d], a row of real tokens."""
    n, half = len(k), kernel_size // 2
    if n <= budget:
        return list(range(n))
    votes = np.zeros(n)
    for row in range(n - window, n):
        for head in range(q.shape[1]):
            scores = np.exp(q[row, head].astype(np.float64) @ k[: row + 1].T / np.sqrt(k.shape[1]))
            votes[: row + 1] += scores / scores.sum()
    before = np.pad(votes[: n - window], half)
    pooled = [
        before[i : i + kernel_size].max() if pooling == "max"
        else before[i : i + kernel_size].sum() / kernel_size
        for i in range(n - window)
    ]  # fmt: skip
    chosen = np.argsort(-np.round(pooled, 12), kind="stable")[: budget - window]
    return [*sorted(chosen.tolist()), *range(n - window, n)]


def check_kept(got, k, v, want):
    """`want[row][head]` are the positions kept; the slots after them are zeros."""
    k, v = np.asarray(k), np.asarray(v)
    for row, heads in enumerate(want):
        for head, positions in enumerate(heads):
            assert got.stored[row] == len(positions)
            for kept, all_of in ((got.keys, k), (got.values, v)):
                own = np.asarray(kept[row, :, head])
                np.testing.assert_array_equal(own[: len(positions)], all_of[row, positions, head])
                assert not own[len(positions) :].any()


def all_voted(q, k, lengths, budgets, **sizes):
    q, k = np.asarray(q), np.asarray(k)
    group = q.shape[2] // k.shape[2]
    return [
        [
            voted(q[b, :n, h * group : (h + 1) * group], k[b, :n, h], budget=budget, **sizes)
            for h in range(k.shape[2])
        ]
        for b, (n, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]


@pytest.mark.parametrize(
    ("budget", "window", "kernel_size", "pooling"),
    [
        pytest.param(20, 8, 5, "avg", id="avg"),
        pytest.param(20, 8, 7, "max", id="max"),
        pytest.param(37, 1, 1, "avg", id="one-query-no-pooling"),
    ],
)
def test_snap_kv_keeps_what_the_last_queries_vote_for(budget, window, kernel_size, pooling):
    q, k, v = random_qkv(0, batch=3, q_len=N, heads=6, kv_heads=2, head_dim=8)
    q = 3 * q  # peaks, as real heads have them
    sizes = {"window": window, "kernel_size": kernel_size, "pooling": pooling}
    lengths = jnp.array(LENGTHS, jnp.int32)
    got = jax.jit(SnapKV(budget=budget, **sizes))(q, k, v, lengths=lengths)
    assert got.keys.shape == (3, budget, 2, 8)
    check_kept(got, k, v, all_voted(q, k, LENGTHS, [budget] * 3, **sizes))


def test_neighbours_are_pooled_up_to_the_ends_alone():
    # All votes are equal, but the mean of five has zeros beyond both ends of the keys before the
    # window, 0 to 15: the two at each end come last. Of equal ones the lower positions are first.
    _, k, v = random_qkv(1, batch=3, q_len=20, heads=1, kv_heads=1, head_dim=4)
    inner, window, budgets = [*range(2, 14)], [16, 17, 18, 19], jnp.array([9, 16, 18])
    got = jax.jit(lambda k, v: keep_voted(
        jnp.zeros_like(k), k, v, lengths=jnp.full(3, 20), budgets=budgets, capacity=18, window=4,
        kernel_size=5, pooling="avg",
    ))(k, v)  # fmt: skip
    want = [[*inner[:5], *window], [*inner, *window], [1, *inner, 14, *window]]
    check_kept(got, k, v, [[row] for row in want])


def test_votes_of_query_heads_that_share_keys_are_added():
    # Head 0 votes 0.9 for key 3, heads 1 and 2 vote 0.6 for key 7: the sum of all three is for 7.
    n = 12
    q, k = np.zeros((3, n, 3, n), np.float32), np.zeros((3, n, 1, n), np.float32)
    k[:, :, 0] = np.eye(n)
    for head, (key, share) in enumerate(((3, 0.9), (7, 0.6), (7, 0.6))):
        logit = np.log(share / (1 - share) * (n - 1)) * np.sqrt(n)
        q[head:, -1, head, key] = logit  # in row r only heads 0 to r care
    k = jnp.asarray(k)
    got = jax.jit(SnapKV(budget=2, window=1, kernel_size=1))(jnp.asarray(q), k, k)
    check_kept(got, k, k, [[[3, n - 1]], [[3, n - 1]], [[7, n - 1]]])


def test_pyramid_kv_is_snap_kv_with_each_layers_budget():
    q, k, v = random_qkv(2, batch=3, q_len=N, heads=4, kv_heads=2, head_dim=8)
    pyramid = PyramidKV.for_layers(3, budget=16, window=4, beta=4)
    budgets = [[25, 16, 7], [25, 16, 7], [16, 16, 16]]  # B = 12: 21, 12 and 3, and the window
    sizes = {"window": 4, "kernel_size": 7, "pooling": "max"}
    assert pyramid.capacity == 25
    run = jax.jit(lambda layer, q, k, v, lengths: layer(q, k, v, lengths=lengths))
    for layer in range(3):
        own = jax.tree.map(lambda x, i=layer: x[i], pyramid)
        got = run(own, q, k, v, jnp.array(LENGTHS, jnp.int32))
        assert got.keys.shape[1] == 25
        check_kept(got, k, v, all_voted(q, k, LENGTHS, [b[layer] for b in budgets], **sizes))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("num_layers", "budget", "window"),
    [(1, 1024, 32), (2, 65, 32), (7, 40, 32), (7, 1000, 1), (32, 1024, 32)],
)
def test_pyramid_budgets_fall_and_have_the_total_of_snap_kv(num_layers, budget, window):
    pyramid = PyramidKV.for_layers(num_layers, budget=budget, window=window)
    share = budget - window
    lengths = np.array([1, budget, 2 * share, 2 * share + 7, 100_000], np.int32)
    over_layers = dataclasses.replace(pyramid, layer=pyramid.layer[:, None])
    budgets = np.asarray(over_layers.layer_budgets(lengths[None, :]))
    kept = np.minimum(budgets, lengths)
    assert np.all(kept.sum(axis=0) == num_layers * np.minimum(budget, lengths))
    assert np.all(np.diff(budgets, axis=0) <= 0)
    assert np.all(budgets >= window)
    assert np.all(budgets <= pyramid.capacity)
    if num_layers > 1:
        assert budgets[0, -1] == window + 2 * share - share // 20
        assert budgets[-1, -1] == window + share // 20
        # A prompt a little longer than 2 B keeps everything in the first layer.
        assert kept[0, 3] == min(2 * share + 7, pyramid.capacity)


def test_streaming_keeps_the_first_and_the_last():
    q, k, v = random_qkv(3, batch=3, q_len=N)
    got = jax.jit(StreamingKV(4, 7))(q, k, v, lengths=jnp.array(LENGTHS, jnp.int32))
    assert got.keys.shape == (3, 11, 2, 16)
    want = [[0, 1, 2, 3, *range(54, 61)], [0, 1, 2, 3, *range(31, 38)], [0, 1, 2, 3, 4]]
    check_kept(got, k, v, [[row, row] for row in want])


@pytest.mark.parametrize(
    "compression",
    [
        pytest.param(SnapKV(budget=1000, window=900), id="snapkv"),
        pytest.param(StreamingKV(N - 1, 1), id="streaming"),
        pytest.param(PyramidKV(np.int32(3), 4, budget=N), id="pyramidkv"),
    ],
)
def test_a_prompt_within_the_budget_is_kept_as_it_is(compression):
    q, k, v = random_qkv(4, q_len=N)
    got = jax.jit(compression)(q, k, v)
    np.testing.assert_array_equal(got.keys, k)
    np.testing.assert_array_equal(got.values, v)
    assert got.stored.tolist() == [N]


def test_memory_is_far_below_the_square_of_the_length():
    n = 8192
    shape = lambda heads: jax.ShapeDtypeStruct((1, n, heads, 16), jnp.float32)
    compiled = jax.jit(SnapKV(budget=64)).lower(shape(4), shape(2), shape(2)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * n / 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: SnapKV(budget=32), "window of 32 and a budget of 32", id="budget"),
        pytest.param(lambda: SnapKV(window=0), "window of 0", id="window"),
        pytest.param(lambda: SnapKV(kernel_size=4), "odd `kernel_size`.* got 4", id="even"),
        pytest.param(lambda: SnapKV(pooling="sum"), "got 'sum'", id="pooling"),
        pytest.param(lambda: StreamingKV(-1, 4), "-1 and 4", id="sinks"),
        pytest.param(lambda: StreamingKV(4, 0), "4 and 0", id="recent"),
        pytest.param(lambda: PyramidKV.for_layers(0), "got 0 and 20", id="no-layers"),
        pytest.param(lambda: PyramidKV.for_layers(2, beta=0), "got 2 and 0", id="beta"),
    ],
)
def test_sizes_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_calls_that_cannot_be_served_are_explained(as_users_see_it):
    q, k, v = random_qkv(5, q_len=8)
    with pytest.raises(ValueError, match="compression of 3 layers"):
        PyramidKV.for_layers(3)(q, k, v)
    for compression in (SnapKV(), StreamingKV(), PyramidKV(np.int32(0), 2)):
        with pytest.raises(ValueError, match="after the whole prompt"):
            compression(q[:, 4:], k, v)
        with pytest.raises(ValueError, match=r"`lengths` must be within 1\.\.8"):
            compression(q, k, v, lengths=jnp.array([9]))
