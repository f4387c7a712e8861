"""What the adaptive patterns visit: by hand, and against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minference_jax as mj
from minference_jax.adaptive import lists
from minference_jax.adaptive.block_diagonals import diagonal_mass
from minference_jax.index.select import top_mass_count, top_mass_mask
from pallas_kernels.block_sparse_attention.index import validate
from tests.core import brute_force_adaptive as brute_force
from tests.core.adaptive import (
    ELEMENTS,
    HEADS,
    KV_HEADS,
    KV_LEN,
    LAYOUT,
    LENGTHS,
    Q_LEN,
    REAL,
    prompts,
)
from tests.helpers import causal_mask

THRESHOLD = {"alpha": 0.6, "sink_blocks": 1, "local_blocks": 4}
# Of both kinds there are lists, by head and by group.
FLEX = {"gamma": 0.35, "tau": 0.28, "min_budget": 16, "max_budget": 48}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(lists, "ELEMENTS", ELEMENTS)


@functools.cache
def masker(layout):
    @jax.jit
    def run(estimator, q, k, lengths):
        attention = mj.AdaptiveAttention(estimator, layout, dense_above=None)
        index = attention.estimate(q, k, lengths=lengths)
        return index, index.to_mask(*(x.shape[1] for x in (q, k)), lengths=lengths)

    return run


def expected(name, prompt, parameters):
    if name == "diagonals":
        return brute_force.block_diagonals(prompt, **parameters)
    if name == "flex":
        return prompt.mask(brute_force.flex_prefill(prompt, **parameters)[0])
    choose = {"threshold": brute_force.block_threshold, "antidiagonals": brute_force.x_attention,
              "mass": brute_force.block_mass}  # fmt: skip
    return prompt.mask(lambda first: choose[name](prompt, first, **parameters))


@pytest.mark.parametrize(
    ("name", "estimator", "parameters", "everything", "shared"),
    [
        (
            "threshold",
            mj.BlockThreshold,
            THRESHOLD | {"pooled_rows": 1, "parts": 1},
            {"alpha": 0.0},
            False,
        ),
        (
            "threshold",
            mj.BlockThreshold,
            THRESHOLD | {"pooled_rows": 8, "parts": 4},
            {"alpha": 0.0},
            True,
        ),
        ("mass", mj.BlockMass, {"mass": 0.1, "rows": 32}, {"mass": 0.0}, False),
        ("mass", mj.BlockMass, {"mass": 0.1, "rows": 4}, {"mass": 0.0}, True),
        ("antidiagonals", mj.XAttention, {"tau": 0.6, "stride": 8}, {"tau": 1.0}, True),
        ("flex", mj.FlexPrefill, FLEX, {"gamma": 1.0, "max_budget": 200}, False),
        ("flex", mj.FlexPrefill, FLEX, {"gamma": 1.0, "max_budget": 200}, True),
        ("diagonals", mj.BlockDiagonals, {"num_diagonals": 5}, {"num_diagonals": 20}, True),
    ],
)
def test_visited_mask_equals_brute_force(
    name, estimator, parameters, everything, shared, monkeypatch
):
    if name == "threshold":
        # Its step holds block scores alone: two query tiles at a time, too.
        monkeypatch.setattr(lists, "ELEMENTS", 2 * 2 * HEADS * 9)
    q, k, _ = prompts()
    layout = dataclasses.replace(LAYOUT, shared=shared)
    run = masker(layout)
    index, mask = run(estimator(**parameters), *map(jnp.asarray, (q, k, LENGTHS)))
    validate(index)
    group = HEADS // KV_HEADS
    densities, masks = [], set()
    for b, h in np.ndindex(2, HEADS):
        together = range(h // group * group, (h // group + 1) * group) if shared else (h,)
        prompt = brute_force.Prompt(
            [q[b, :, x] for x in together], k[b, :, h // group], KV_LEN - Q_LEN, int(LENGTHS[b]),
            layout.block_q, layout.block_kv,
        )  # fmt: skip
        want = expected(name, prompt, parameters)
        real = REAL[b]
        np.testing.assert_array_equal(mask[b, h, :real], want[:real], err_msg=f"{b}, {h}")
        masks.add(want.tobytes())
        densities.append(want.sum() / causal_mask(Q_LEN, KV_LEN)[:real].sum())
    assert min(densities) < 0.8, "the case must be sparse to mean something"
    assert len(masks) > 2, "heads must differ to mean something"
    _, mask = run(estimator(**parameters | everything), *map(jnp.asarray, (q, k, LENGTHS)))
    for b, length in enumerate(REAL):
        want = np.broadcast_to(causal_mask(Q_LEN, KV_LEN)[:length], (HEADS, length, KV_LEN))
        np.testing.assert_array_equal(mask[b, :, :length], want)


@jax.jit
def small_mask(estimator, q, k):
    layout = mj.Layout(block_q=8, block_kv=8)
    attention = mj.AdaptiveAttention(estimator, layout, dense_above=None)
    return attention.estimate(q, k).to_mask(40, 40)[0, 0]


def small_case(estimator, q, k):
    """Blocks [tile, block] of 8 by 8 that 40 queries of one head visit. q and k [40, 2]."""
    q = q * 2**0.5  # takes the scale of the scores away
    mask = small_mask(estimator, *(jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k)))
    return np.asarray(mask)[7::8, ::8].astype(int).tolist()


def rows(values, repeats=1):
    """[40, 2] with these values before zeros."""
    return np.stack([np.repeat(values, repeats), np.zeros(40)], axis=1)


def one_by_one(alpha, sink_blocks, local_blocks):
    return mj.BlockThreshold(alpha, sink_blocks, local_blocks, pooled_rows=1, parts=1)


ONES = rows(np.ones(40))
# Every query sees blocks of keys in the proportions 2 : 1 : 4 : 1 : 2.
KEYS = rows(np.log([2.0, 1.0, 4.0, 1.0, 2.0]), 8)


def test_threshold_by_hand():
    k = rows([3.0, 1.0, 5.0, 4.0, 9.0], 8)
    assert small_case(one_by_one(0.3, 0, 1), ONES, k) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],  # only block 0 is in the past: it is the best
        [1, 0, 1, 0, 0],  # block 1 is e^-2 = 0.14 of block 0
        [0, 0, 1, 1, 0],  # the best is block 2, and block 0 is e^-2 of it
        [0, 0, 1, 1, 1],  # block 3 is e^-1 = 0.37 of block 2
    ]
    sink_and_local = small_case(one_by_one(0.3, 1, 2), ONES, k)
    assert sink_and_local[3:] == [[1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]


def test_threshold_ignores_the_weight_of_sinks():
    # Beside block 0 all others are nothing; among themselves, block 2 is the best.
    k = rows([50.0, 3.0, 5.0, 1.0, 0.0], 8)
    for sinks, kept in ((0, [1, 0, 0, 0, 1]), (1, [1, 0, 1, 0, 1])):
        assert small_case(one_by_one(0.3, sinks, 1), ONES, k)[4] == kept


def test_threshold_adds_the_parts_of_a_block():
    # Tile 4 weighs the means of parts: block 1 has one of 4, block 2 two of 1, block 3 one of 2.
    low = -9.0
    k = np.full((40, 2), low)
    k[8:12], k[16:24], k[24:28] = np.log(4.0), 0.0, np.log(2.0)
    two = mj.BlockThreshold(0.45, 1, 1, pooled_rows=1, parts=2)
    assert small_case(two, ONES, k)[4] == [1, 1, 1, 1, 1]
    assert small_case(dataclasses.replace(two, alpha=0.55), ONES, k)[4] == [1, 1, 0, 0, 1]
    # Whole blocks: the outstanding halves drown in their means.
    one = dataclasses.replace(two, parts=1)
    assert small_case(one, ONES, k)[4] == [1, 0, 1, 0, 1]


def test_threshold_sums_over_rows():
    # One row of tile 4 is certain of block 1; to the other seven block 0 is twice block 2.
    k = np.zeros((40, 2))
    k[:8, 0], k[8:16], k[24:, 0] = np.log(2.0), [-20.0, 20.0], -20.0
    q = np.tile([1.0, 0.0], (40, 1))
    q[32] = [0.0, 5.0]
    # The blocks' sums are 7 * 2/3, 1, 7 * 1/3 and 0: shares of the best 1, 0.21, 0.5 and 0.
    for alpha, kept in ((0.55, [1, 0, 0, 0, 1]), (0.45, [1, 0, 1, 0, 1]), (0.2, [1, 1, 1, 0, 1])):
        assert small_case(one_by_one(alpha, 0, 1), q, k)[4] == kept, alpha


def test_antidiagonals_by_hand():
    # Tile 4 holds 0.2, 0.1, 0.4, 0.1 and 0.2 of its mass; blocks 0 and 4 are forced.
    for tau, kept in (
        (0.39, [1, 0, 0, 0, 1]),
        (0.75, [1, 0, 1, 0, 1]),
        (0.85, [1, 1, 1, 0, 1]),
        (0.95, [1, 1, 1, 1, 1]),
    ):
        assert small_case(mj.XAttention(tau, stride=8), ONES, KEYS)[4] == kept, tau
    # Row 2 of tile 4 meets key 5 of a block on the antidiagonal, but not key 4.
    q, k = np.zeros((40, 2)), np.zeros((40, 2))
    q[34, 0], k[8 + 5, 0], k[16 + 4, 0] = 8.0, 3.0, 9.0
    # The weights are 1, e^3, 1, 1 and 1.
    assert small_case(mj.XAttention(0.9, stride=8), q, k)[4] == [1, 1, 0, 0, 1]


def test_flex_prefill_by_hand():
    # Vertical-slash: key 17 has all mass of the last eight queries, at distances 15 to 22. Two
    # blocks of each at least: columns 0 (forced) and 2, diagonals 0 (forced) and 2.
    k = np.zeros((40, 2))
    k[17, 0] = 20.0
    assert small_case(mj.FlexPrefill(0.9, 0.0, min_budget=16), ONES, k) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    # Without a least budget the forced ones are all; more mass asked for is more blocks of keys.
    assert small_case(mj.FlexPrefill(0.9, 0.0, min_budget=0), ONES, k)[4] == [1, 0, 0, 0, 1]
    assert small_case(mj.FlexPrefill(0.9, 0.0, min_budget=0), ONES, 0 * k)[4] == [1, 1, 1, 1, 1]
    # Query-aware: the map's largest entries are 1, 2/3, 4/7, 1/2, 0.4, 1/3, 2/7, 1/4, 0.2, 0.2 and
    # 1/7 (tile 2, block 1), and 4.5 of its mass of 5 takes them all.
    for gamma, tile in ((0.6, [1, 0, 1, 0, 0]), (0.88, [1, 0, 1, 0, 0]), (0.9, [1, 1, 1, 0, 0])):
        assert small_case(mj.FlexPrefill(gamma, 2.0, min_budget=0), ONES, KEYS) == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            tile,
            [1, 0, 1, 1, 0],
            [1, 0, 1, 0, 1],
        ], gamma


def test_mass_of_block_diagonals_by_hand():
    # A row of a tile of 8 finds the key 20 before it two tiles back from half of its places, three
    # back from the others; the key 16 before it always two back.
    mass = jax.jit(functools.partial(diagonal_mass, num_diagonals=6, block_q=8, block_kv=8))
    for distance, want in ((20, [0, 0, 0.5, 0.5, 0, 0]), (16, [0, 0, 1, 0, 0, 0])):
        slash = jnp.zeros(40).at[distance].set(1.0)
        np.testing.assert_allclose(mass(slash, shift=jnp.int32(0)), want)


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(-1, 6), min_size=9, max_size=9), mass=st.integers(0, 40))
def test_the_smallest_set_that_reaches_a_mass(scores, mass):
    scores = np.array(scores, np.float32)
    count, mask = smallest_set(scores, np.float32(mass))
    positive = np.sort(scores[scores >= 0])[::-1]
    reached = np.cumsum(positive) >= mass
    want = 0 if mass == 0 else int(reached.argmax()) + 1 if reached.any() else len(positive)
    assert count == want
    # Ties go to the lower position.
    best = [at for at in np.argsort(-scores, kind="stable") if scores[at] >= 0][:want]
    assert np.flatnonzero(mask).tolist() == sorted(best)


@jax.jit
def smallest_set(scores, mass):
    return top_mass_count(scores, mass), top_mass_mask(scores, mass)


def test_a_list_that_overflows_becomes_dense():
    arrays = (*map(jnp.asarray, prompts()[:2]), jnp.asarray(LENGTHS))
    estimator = mj.BlockThreshold(**THRESHOLD, parts=2)
    whole, mask = masker(LAYOUT)(estimator, *arrays)
    index, small = masker(dataclasses.replace(LAYOUT, max_blocks=6))(estimator, *arrays)
    validate(index)
    overflows = np.asarray(whole.count) > 6
    assert overflows.any()
    assert not overflows.all()
    rows = np.repeat(overflows, 32, axis=2)[:, :, :Q_LEN]
    want = np.where(rows[..., None], causal_mask(Q_LEN, KV_LEN), np.asarray(mask))
    for b, length in enumerate(REAL):
        np.testing.assert_array_equal(small[b, :, :length], want[b, :, :length])


def test_triangle_mix_is_dense_below_a_layer():
    sizes = {"sink_size": 4, "window_size": 64, "last_size": 32}
    made = mj.triangle_mix(num_layers=3, num_heads=2, first_triangle=1, **sizes)
    assert made.grid() == [[mj.Dense()] * 2, *[[mj.TriShape(**sizes)] * 2] * 2]
    lines = mj.VerticalSlash(vertical_size=30, slash_size=50)
    made = mj.triangle_mix(num_layers=2, num_heads=2, first_triangle=1, shallow=lines, **sizes)
    assert made.pattern(0, 1) == lines
    with pytest.raises(ValueError, match=r"within 0\.\.3, got 4"):
        mj.triangle_mix(num_layers=3, num_heads=2, first_triangle=4, **sizes)


@pytest.mark.parametrize(
    "estimator",
    [mj.BlockThreshold(0.1, pooled_rows=1, parts=1), mj.XAttention(0.9)],
    ids=["threshold", "antidiagonals"],
)
def test_scores_are_never_held_at_once(monkeypatch, estimator):
    # All scores would be 134 MB (65,536 rows, 512 blocks) or 67 MB (4096 groups) for each head.
    monkeypatch.setattr(lists, "ELEMENTS", 2**20)
    shape = jax.ShapeDtypeStruct((1, 2**16, 2, 16), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    estimate = lambda made, q, k, lengths: made.estimate(q, k, lengths=lengths)
    lowered = jax.jit(estimate).lower(mj.AdaptiveAttention(estimator), shape, shape, lengths)
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 60e6
