"""The adaptive patterns: definitions, limits, fallbacks, and use as attention of a model."""

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
from minference_jax.index.select import top_k_mask, top_mass_count
from pallas_kernels.block_sparse_attention.index import validate
from tests.core import brute_force_adaptive as brute_force
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv

Q_LEN, KV_LEN, HEADS, KV_HEADS = 77, 141, 4, 2
LENGTHS = np.array([141, 129])
LAYOUT = mj.Layout(block_q=32, block_kv=16, max_blocks=9)

THRESHOLD = {"alpha": 0.6, "sink_blocks": 1, "local_blocks": 4}
FLEX = {"gamma": 0.35, "tau": 0.35, "min_budget": 16, "max_budget": 48}


@pytest.fixture(scope="module")
def prompts():
    """Queries, keys and values; neighbours are alike, so that blocks differ."""
    q, k, v = random_qkv(
        1, batch=2, q_len=Q_LEN, kv_len=KV_LEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=16
    )
    rng = np.random.default_rng(0)
    alike = lambda x: np.repeat(
        rng.standard_normal((2, x.shape[1] // 8 + 1, *x.shape[2:]), np.float32), 8, axis=1
    )[:, : x.shape[1]]
    return q + 2 * alike(q), k + 2 * alike(k), v


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Two query tiles at a time: the last step is short and begins before its rows."""
    monkeypatch.setattr(lists, "ELEMENTS", 2 * 2 * HEADS * 32 * 9)


@functools.cache
def masker(layout):
    @jax.jit
    def run(estimator, q, k, lengths):
        attention = mj.AdaptiveAttention(estimator, layout, dense_above=None)
        index = attention.estimate(q, k, lengths=lengths)
        return index, index.to_mask(*(x.shape[1] for x in (q, k)), lengths=lengths)

    return run


def expected(name, estimator, prompt, parameters):
    if name == "diagonals":
        return brute_force.block_diagonals(prompt, **parameters)
    if name == "flex":
        return prompt.mask(brute_force.flex_prefill(prompt, **parameters)[0])
    choose = {"threshold": brute_force.block_threshold, "antidiagonals": brute_force.x_attention}
    return prompt.mask(lambda first: choose[name](prompt, first, **parameters))


@pytest.mark.parametrize(
    ("name", "estimator", "parameters", "everything", "shared"),
    [
        ("threshold", mj.BlockThreshold, THRESHOLD | {"pooled_rows": 1}, {"alpha": 0.0}, False),
        ("threshold", mj.BlockThreshold, THRESHOLD | {"pooled_rows": 8}, {"alpha": 0.0}, True),
        ("antidiagonals", mj.XAttention, {"tau": 0.6, "stride": 8}, {"tau": 1.0}, True),
        ("flex", mj.FlexPrefill, FLEX, {"gamma": 1.0, "max_budget": 200}, False),
        ("flex", mj.FlexPrefill, FLEX, {"gamma": 1.0, "max_budget": 200}, True),
        ("diagonals", mj.BlockDiagonals, {"num_diagonals": 5}, {"num_diagonals": 20}, True),
    ],
)
def test_visited_mask_equals_brute_force(prompts, name, estimator, parameters, everything, shared):
    q, k, _ = prompts
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
        want = expected(name, estimator, prompt, parameters)
        real = LENGTHS[b] - (KV_LEN - Q_LEN)
        np.testing.assert_array_equal(mask[b, h, :real], want[:real], err_msg=f"{b}, {h}")
        masks.add(want.tobytes())
        densities.append(want.sum() / causal_mask(Q_LEN, KV_LEN)[:real].sum())
    assert min(densities) < 0.8, "the case must be sparse to mean something"
    assert len(masks) > 2, "heads must differ to mean something"
    _, mask = run(estimator(**parameters | everything), *map(jnp.asarray, (q, k, LENGTHS)))
    for b, length in enumerate(LENGTHS - (KV_LEN - Q_LEN)):
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


ONES = rows(np.ones(40))
# Every query sees blocks of keys in the proportions 2 : 1 : 4 : 1 : 2.
KEYS = rows(np.log([2.0, 1.0, 4.0, 1.0, 2.0]), 8)


def test_threshold_by_hand():
    k = rows([3.0, 1.0, 5.0, 4.0, 9.0], 8)
    assert small_case(mj.BlockThreshold(0.3, 0, 1), ONES, k) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],  # only block 0 is in the past: it is the best
        [1, 0, 1, 0, 0],  # block 1 is e^-2 = 0.14 of block 0
        [0, 0, 1, 1, 0],  # the best is block 2, and block 0 is e^-2 of it
        [0, 0, 1, 1, 1],  # block 3 is e^-1 = 0.37 of block 2
    ]
    sink_and_local = small_case(mj.BlockThreshold(0.3, 1, 2), ONES, k)
    assert sink_and_local[3:] == [[1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]


def test_threshold_sums_over_rows():
    # One row of tile 4 is certain of block 1; to the other seven block 0 is twice block 2.
    k = np.zeros((40, 2))
    k[:8, 0], k[8:16], k[24:, 0] = np.log(2.0), [-20.0, 20.0], -20.0
    q = np.tile([1.0, 0.0], (40, 1))
    q[32] = [0.0, 5.0]
    # The blocks' sums are 7 * 2/3, 1, 7 * 1/3 and 0: shares of the best 1, 0.21, 0.5 and 0.
    for alpha, kept in ((0.55, [1, 0, 0, 0, 1]), (0.45, [1, 0, 1, 0, 1]), (0.2, [1, 1, 1, 0, 1])):
        assert small_case(mj.BlockThreshold(alpha, 0, 1), q, k)[4] == kept, alpha


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
    assert sorted(scores[np.asarray(mask)]) == sorted(positive[:want])


@jax.jit
def smallest_set(scores, mass):
    count = top_mass_count(scores, mass)
    return count, top_k_mask(scores, count)


def hybrid(alpha=0.5, num_columns=20):
    """One layer or several, with a parameter for each head, so that all share a program."""
    alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (np.size(alpha) // HEADS or 1, HEADS))
    columns = jnp.full_like(alpha, num_columns, jnp.int32)
    return mj.WithColumns(mj.BlockThreshold(alpha, 1, 2), columns, max_columns=32)


def attention(estimator, *, dense_above=None, shared=False):
    layout = dataclasses.replace(LAYOUT, shared=shared)
    return mj.AdaptiveAttention(estimator, layout, dense_above=dense_above)


@jax.jit
def attend(attention, q, k, v, lengths):
    out, index = attention.attend(q, k, v, lengths=lengths)
    return out, index, index.to_mask(Q_LEN, KV_LEN, lengths=lengths)


def test_hybrid_is_blocks_and_columns_and_output_is_attention_over_them(prompts):
    arrays = (*map(jnp.asarray, prompts), jnp.asarray(LENGTHS))
    out, index, mask = attend(attention(hybrid()).for_layers(1).layer(0), *arrays)
    validate(index)
    q, k, _ = prompts
    for b, h in np.ndindex(2, HEADS):
        prompt = brute_force.Prompt(
            [q[b, :, h]], k[b, :, h // 2], KV_LEN - Q_LEN, int(LENGTHS[b]), 32, 16
        )
        parameters = {"alpha": 0.5, "sink_blocks": 1, "local_blocks": 2, "pooled_rows": 1}
        want = expected("threshold", None, prompt, parameters)
        want[:, sorted(brute_force.columns(prompt, 20))] = True
        real = LENGTHS[b] - (KV_LEN - Q_LEN)
        want &= causal_mask(Q_LEN, KV_LEN)
        np.testing.assert_array_equal(mask[b, h, :real], want[:real])
    want = masked_attention(*prompts, np.asarray(mask))
    for b, length in enumerate(LENGTHS - (KV_LEN - Q_LEN)):
        assert_attention_close(out[b : b + 1, :length], want[b : b + 1, :length])


def test_a_list_that_overflows_becomes_dense(prompts):
    arrays = (*map(jnp.asarray, prompts[:2]), jnp.asarray(LENGTHS))
    estimator = mj.BlockThreshold(**THRESHOLD)
    whole, mask = masker(LAYOUT)(estimator, *arrays)
    index, small = masker(dataclasses.replace(LAYOUT, max_blocks=6))(estimator, *arrays)
    validate(index)
    overflows = np.asarray(whole.count) > 6
    assert overflows.any()
    assert not overflows.all()
    rows = np.repeat(overflows, 32, axis=2)[:, :, :Q_LEN]
    want = np.where(rows[..., None], causal_mask(Q_LEN, KV_LEN), np.asarray(mask))
    for b, length in enumerate(LENGTHS - (KV_LEN - Q_LEN)):
        np.testing.assert_array_equal(small[b, :, :length], want[b, :, :length])


def test_real_rows_do_not_depend_on_padding_or_other_rows(prompts):
    q, k, v = map(jnp.asarray, prompts)
    made = attention(hybrid()).for_layers(1).layer(0)
    together = attend(made, q, k, v, jnp.asarray(LENGTHS))[0]
    real = int(LENGTHS[1]) - (KV_LEN - Q_LEN)
    noise = [
        jnp.where(jnp.arange(x.shape[1])[None, :, None, None] < n, x, -3.0)
        for x, n in ((q, real), (k, int(LENGTHS[1])), (v, int(LENGTHS[1])))
    ]
    again = attend(made, *(x.at[0].set(x[1]) for x in noise), jnp.asarray(LENGTHS[[1, 1]]))
    np.testing.assert_array_equal(again[0][0, :real], together[1, :real])


def costly(index, dense_above):
    """Which query tiles execute more than this many times what dense attention does, and that."""
    # The first row is at 64, so query tiles begin where key tiles do.
    end = KV_LEN - Q_LEN + 32 * np.arange(1, 4)
    used = np.arange(index.columns.shape[2]) < index.column_count[..., None]
    seen = used[:, :, None] & (index.columns[:, :, None] < end[:, None])
    executed = index.count + -(-seen.sum(axis=3) // 16)
    return executed > dense_above * (end // 16), end // 16


def test_parameters_are_data_and_costly_query_tiles_dense(prompts):
    arrays = (*map(jnp.asarray, prompts), jnp.asarray(LENGTHS))
    attend(attention(hybrid()).for_layers(1).layer(0), *arrays)
    programs = attend._cache_size()
    alphas = np.repeat([0.1, 0.5, 0.9], HEADS).reshape(3, HEADS)
    layers = attention(hybrid(alphas)).for_layers(3)
    plain = [jax.device_get(attend(layers.layer(i), *arrays)[1:]) for i in range(3)]
    assert attend._cache_size() == programs
    assert len({index.count.tobytes() for index, _ in plain}) == 3

    @jax.jit
    def scan(made, q, k, lengths):
        def layer(_, made):
            index = made.estimate(q, k, lengths=lengths)
            return None, (index, index.to_mask(Q_LEN, KV_LEN, lengths=lengths))

        return jax.lax.scan(layer, None, made)[1]

    made = attention(hybrid(alphas), dense_above=0.9).for_layers(3)
    found, masks = scan(made, arrays[0], arrays[1], arrays[3])
    fell_back = []
    for (index, mask), count, got in zip(plain, np.asarray(found.count), masks, strict=True):
        above, dense = costly(index, 0.9)
        np.testing.assert_array_equal(count, np.where(above, dense, index.count))
        rows = np.repeat(above, 32, axis=2)[:, :, :Q_LEN]
        want = np.where(rows[..., None], causal_mask(Q_LEN, KV_LEN), mask)
        for b, length in enumerate(LENGTHS - (KV_LEN - Q_LEN)):
            np.testing.assert_array_equal(got[b, :, :length], want[b, :, :length])
        fell_back.append(above)
    assert 0 < np.sum(fell_back) < np.size(fell_back)
    alphas[0] = [0.1, 0.5, 0.9, 0.1]
    mixed = attention(hybrid(alphas), dense_above=0.9).for_layers(3)
    count = np.asarray(scan(mixed, arrays[0], arrays[1], arrays[3])[0].count)[0]
    of_head = np.stack([found.count[at][:, h] for h, at in enumerate((0, 1, 2, 0))], axis=1)
    np.testing.assert_array_equal(count, of_head)


def test_an_index_from_outside_is_visited_as_it_is(prompts):
    q, k, v = map(jnp.asarray, prompts)
    lengths = jnp.asarray(LENGTHS)
    _, index, mask = attend(attention(hybrid()).for_layers(1).layer(0), q, k, v, lengths)
    layers = mj.IndexedAttention(jax.tree.map(lambda x: jnp.stack([0 * x, x]), index), "reference")
    visit = jax.jit(lambda made, q, k, v, lengths: made.attend(q, k, v, lengths=lengths))
    out, used = visit(layers.layer(1), q, k, v, lengths)
    np.testing.assert_array_equal(used.entries, index.entries)
    want = masked_attention(*prompts, np.asarray(mask))
    for b, length in enumerate(LENGTHS - (KV_LEN - Q_LEN)):
        assert_attention_close(out[b : b + 1, :length], want[b : b + 1, :length])


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
    [mj.BlockThreshold(0.1), mj.XAttention(0.9)],
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


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained(prompts):
    call = lambda made: jax.eval_shape(made, *prompts)
    plain = mj.BlockThreshold(0.1)
    with pytest.raises(ValueError, match=r"`alpha` must be within 0\.0\.\.1\.0, got 1\.5"):
        mj.BlockThreshold(1.5)
    with pytest.raises(ValueError, match=r"layer\(i\)"):
        call(attention(plain).for_layers(2))
    with pytest.raises(ValueError, match="is for 3 lists, but there are 4"):
        call(attention(mj.BlockThreshold(jnp.ones(3))))
    with pytest.raises(ValueError, match="is for 4 lists, but there are 2"):
        call(attention(mj.BlockThreshold(jnp.ones(4)), shared=True))
    with pytest.raises(ValueError, match="one layer"):
        attention(plain).layer(0)
    with pytest.raises(ValueError, match="layer 2 of an attention with 2 layers"):
        attention(plain).for_layers(2).layer(2)
    with pytest.raises(ValueError, match="for 2 layers, not for 3"):
        attention(plain).for_layers(2).for_layers(3)
    with pytest.raises(ValueError, match=r"`pooled_rows` \(5\) must divide"):
        call(attention(mj.BlockThreshold(0.1, pooled_rows=5)))
    with pytest.raises(ValueError, match=r"`stride` \(64\) must divide"):
        call(attention(mj.XAttention(0.1, stride=64)))
    with pytest.raises(ValueError, match="`max_columns` must be given"):
        mj.WithColumns(mj.BlockThreshold(0.1), jnp.array([3]))
    with pytest.raises(ValueError, match=r"within 0\.\.32, got 33"):
        mj.WithColumns(plain, 33, max_columns=32)
    with pytest.raises(ValueError, match="chooses columns itself"):
        call(attention(mj.WithColumns(mj.WithColumns(plain, 3), 3)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mj.Layout(max_blocks=0)
