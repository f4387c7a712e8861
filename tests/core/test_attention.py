"""The attention callables: limits, independence, and what recompiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv

MIXED = [
    mj.VerticalSlash(vertical_size=20, slash_size=30, sink_size=4, window_size=8),
    mj.BlockSparse(num_blocks=1),
    mj.AShape(sink_size=4, window_size=20),
    mj.TriShape(sink_size=4, window_size=20, last_size=9),
]


def sparse(heads, **kwargs):
    patterns = mj.HeadPatterns.from_grid([heads], max_columns=64, max_blocks=8)
    return mj.SparseAttention(patterns, 16, 16, **kwargs).layer(0)


@jax.jit
def attend(attention, q, k, v, lengths=None, q_offset=None):
    return attention(q, k, v, lengths=lengths, q_offset=q_offset)


@pytest.mark.parametrize("length", [1, 63, 100, 257])
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(mj.Dense(), id="dense"),
        pytest.param(mj.VerticalSlash(vertical_size=64, slash_size=4096), id="vertical-slash"),
        pytest.param(mj.AShape(sink_size=0, window_size=4096), id="a-shape"),
        pytest.param(mj.TriShape(sink_size=0, window_size=1, last_size=4096), id="tri-shape"),
        pytest.param(mj.BlockSparse(num_blocks=8), id="block-sparse"),
    ],
)
def test_a_budget_for_everything_is_dense_attention(pattern, length):
    q, k, v = random_qkv(length, q_len=length)
    got = attend(sparse([pattern] * 4), *map(jnp.asarray, (q, k, v)))
    mask = np.broadcast_to(causal_mask(length, length), (1, 4, length, length))
    assert_attention_close(got, masked_attention(q, k, v, mask))


@pytest.mark.parametrize("length", [1, 100, 130])
def test_dense_attention_is_dense(length):
    q, k, v = random_qkv(0, q_len=length, kv_len=130)
    got = attend(mj.DenseAttention(16, 16), *map(jnp.asarray, (q, k, v)))
    mask = np.broadcast_to(causal_mask(length, 130), (1, 4, length, 130))
    assert_attention_close(got, masked_attention(q, k, v, mask))


def test_output_is_attention_over_the_visited_mask():
    q, k, v = random_qkv(4, batch=2, q_len=60, kv_len=150)
    lengths = jnp.array([150, 121])

    @jax.jit
    def run(attention, q, k, v):
        out, index = attention.attend(q, k, v, lengths=lengths)
        return out, index.to_mask(60, 150, lengths=lengths)

    out, mask = run(sparse(MIXED), *map(jnp.asarray, (q, k, v)))
    mask = np.asarray(mask)
    assert_attention_close(out, masked_attention(q, k, v, mask))
    causal = causal_mask(60, 150).sum()
    assert 0.1 < mask[0].sum() / 4 / causal < 0.9, "the case must be sparse to mean something"


def test_real_rows_do_not_depend_on_padding_or_other_rows():
    q, k, v = map(jnp.asarray, random_qkv(7, batch=3, q_len=150))
    lengths = jnp.array([150, 97, 33])
    together = attend(sparse(MIXED), q, k, v, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = [x[row : row + 1, :length] for x in (q, k, v)]
        np.testing.assert_array_equal(
            attend(sparse(MIXED), *alone)[0], together[row, :length], err_msg=f"row {row}"
        )


def test_a_head_does_not_depend_on_other_heads():
    q, k, v = map(jnp.asarray, random_qkv(8, q_len=130, heads=4, kv_heads=4))
    before = attend(sparse(MIXED), q, k, v)
    noise = jax.random.normal(jax.random.key(0), q[:, :, 1:].shape)
    others = [x.at[:, :, 1:].set(noise) for x in (q, k, v)]
    heads = [MIXED[0], mj.Dense(), mj.Dense(), mj.Dense()]
    after = attend(sparse(heads), *others)
    np.testing.assert_array_equal(before[:, :, 0], after[:, :, 0])
    assert not np.array_equal(before[:, :, 1], after[:, :, 1])


def test_chunks_of_dense_attention_equal_the_whole():
    q, k, v = map(jnp.asarray, random_qkv(9, q_len=130))
    whole = attend(mj.DenseAttention(16, 16), q, k, v)
    for start in (0, 37, 90):
        chunk = attend(mj.DenseAttention(16, 16), q[:, start : start + 40], k, v, None, start)
        np.testing.assert_allclose(chunk, whole[:, start : start + 40], atol=1e-6)


def test_new_prompts_budgets_and_assignments_do_not_recompile():
    traces = 0

    @jax.jit
    def run(attention, q, k, v, lengths):
        nonlocal traces
        traces += 1
        return attention(q, k, v, lengths=lengths)

    outputs = []
    for seed, heads, length in (
        (0, MIXED, 100),
        (1, MIXED, 100),
        (1, MIXED[::-1], 100),
        (1, [mj.Dense(), *MIXED[:3]], 100),
        (1, [mj.VerticalSlash(vertical_size=v, slash_size=s) for v, s in
             ((30, 1), (64, 200), (0, 7), (31, 90))], 100),
        (1, [mj.VerticalSlash(vertical_size=31, slash_size=90)] * 4, 61),
    ):  # fmt: skip
        qkv = map(jnp.asarray, random_qkv(seed, q_len=100))
        outputs.append(np.asarray(run(sparse(heads), *qkv, jnp.array([length]))))
    assert traces == 1
    assert len({out.tobytes() for out in outputs}) == len(outputs)


def test_layers_scan_with_their_own_patterns():
    grid = [MIXED, MIXED[::-1], [mj.Dense()] * 4]
    patterns = mj.HeadPatterns.from_grid(grid, max_columns=64, max_blocks=8)
    attention = mj.SparseAttention(patterns, 16, 16)
    q, k, v = map(jnp.asarray, random_qkv(3, q_len=80))
    scanned = jax.lax.scan(lambda _, layer: (None, layer(q, k, v)), None, attention)[1]
    for number in range(3):
        np.testing.assert_array_equal(scanned[number], attend(attention.layer(number), q, k, v))


def test_observed_pairs_are_those_of_the_mask():
    q, k, v = map(jnp.asarray, random_qkv(3, q_len=80))

    @jax.jit
    def run(attention, q, k, v):
        mask = attention.attend(q, k, v)[1].to_mask(80, 80)
        return mj.observe_density(attention, q, k, v), mask

    (out, pairs), mask = run(sparse(MIXED), q, k, v)
    np.testing.assert_array_equal(out, attend(sparse(MIXED), q, k, v))
    np.testing.assert_array_equal(pairs.visited, mask.sum(axis=(2, 3)))
    np.testing.assert_array_equal(pairs.causal, np.full((1, 4), 80 * 81 // 2))


def test_vertical_slash_attention_is_the_uniform_pattern():
    q, k, v = map(jnp.asarray, random_qkv(3, q_len=300))
    run = functools.partial(mj.vertical_slash_attention, vertical_size=40, slash_size=120)
    got = jax.jit(run)(q, k, v)
    pattern = mj.VerticalSlash(vertical_size=40, slash_size=120)
    patterns = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=4)
    np.testing.assert_array_equal(got, attend(mj.SparseAttention(patterns).layer(0), q, k, v))


def test_bfloat16_in_bfloat16_out():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(3, q_len=50))
    assert attend(sparse(MIXED), q, k, v).dtype == jnp.bfloat16


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    q, k, v = map(jnp.asarray, random_qkv(3, q_len=50))
    whole = mj.SparseAttention(mj.HeadPatterns.from_grid([MIXED, MIXED]))
    with pytest.raises(ValueError, match=r"layer\(i\)"):
        whole(q, k, v)
    with pytest.raises(ValueError, match="for 4 heads, but `q` has 2"):
        sparse(MIXED)(q[:, :, :2], k, v)
    with pytest.raises(ValueError, match="layer 2 of an attention with 2 layers"):
        whole.layer(2)
    with pytest.raises(ValueError, match="the attention of one layer"):
        whole.layer(0).layer(0)
    with pytest.raises(ValueError, match="must be a multiple"):
        sparse(MIXED)(q, jnp.repeat(k, 3, axis=2)[:, :, :3], jnp.repeat(v, 3, axis=2)[:, :, :3])
    with pytest.raises(ValueError, match="empty axis"):
        sparse(MIXED)(q[:, :0], k, v)
    with pytest.raises(ValueError, match="at least 1, got -5"):
        mj.vertical_slash_attention(q, k, v, vertical_size=3, slash_size=-5)
