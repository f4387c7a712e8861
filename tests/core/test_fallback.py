"""Heads that would cost more than dense attention run densely, and the others are untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import minference_jax as mj
from minference_jax.index import build_index
from tests.core.test_index import HEADS, KV_HEADS, SHAPES, patterns
from tests.helpers import causal_mask, random_qkv

# One threshold for each shape, because each is a program of its own.
THRESHOLDS = dict(zip(SHAPES[:6], (1.0, 0.6, 1.0, 0.6, 1.0, 0.6), strict=True))


@functools.cache
def builder(shape, dense_above):
    _, _, block_q, block_kv, stagger = shape

    @jax.jit
    def run(patterns, q, k, lengths):
        return build_index(
            patterns, q, k, lengths=lengths, block_q=block_q, block_kv=block_kv, last_q=64,
            dense_above=dense_above, stagger=stagger,
        )  # fmt: skip

    return run


@functools.cache
def masker(shape):
    return jax.jit(lambda index, lengths: index.to_mask(*shape[:2], lengths=lengths))


def layer_of(heads):
    layer = mj.HeadPatterns.from_grid([heads], max_columns=256, max_blocks=4)
    return jax.tree.map(lambda x: x[0], layer)


def executed(index, shape, lengths):
    """Tiles that each head executes, counted one query tile at a time [batch, heads]."""
    q_len, kv_len, block_q, block_kv, _ = shape
    offset = kv_len - q_len
    total = np.zeros(index.begin.shape[:2], int)
    for b, h, i in np.ndindex(*index.begin.shape):
        first = offset + i * block_q
        if first >= lengths[b]:
            assert index.count[b, h, i] == 0
            continue
        columns = np.asarray(index.columns[b, h])[: int(index.column_count[b, h])]
        seen = int((columns < first + block_q).sum())
        total[b, h] += int(index.count[b, h, i]) + -(-seen // block_kv)
    return total


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(list(THRESHOLDS)),
    heads=st.lists(patterns, min_size=HEADS, max_size=HEADS),
    cut=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_no_head_executes_more_tiles_than_dense(shape, heads, cut, seed):
    q_len, kv_len = shape[:2]
    lengths = np.array([kv_len, max(kv_len - q_len + 1, kv_len - cut)])
    q, k, _ = random_qkv(seed, batch=2, q_len=q_len, kv_len=kv_len, heads=HEADS, kv_heads=KV_HEADS)
    inputs = (jnp.asarray(q), jnp.asarray(k), jnp.asarray(lengths))
    layer, dense_above = layer_of(heads), THRESHOLDS[shape]
    plain = jax.device_get(builder(shape, None)(layer, *inputs))
    index = jax.device_get(builder(shape, dense_above)(layer, *inputs))
    dense = executed(builder(shape, None)(layer_of([mj.Dense()] * HEADS), *inputs), shape, lengths)
    before, after = executed(plain, shape, lengths), executed(index, shape, lengths)
    fell_back = before > dense_above * dense
    assert (after <= dense).all()
    np.testing.assert_array_equal(after, np.where(fell_back, dense, before))
    mask, plain_mask = (np.asarray(masker(shape)(x, jnp.asarray(lengths))) for x in (index, plain))
    causal = causal_mask(q_len, kv_len)
    for b, h in np.ndindex(*before.shape):
        real = lengths[b] - (kv_len - q_len)
        want = causal & (np.arange(kv_len) < lengths[b]) if fell_back[b, h] else plain_mask[b, h]
        np.testing.assert_array_equal(mask[b, h, :real], want[:real])


def test_the_threshold_of_an_attention_decides():
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=256, heads=1, kv_heads=1))
    pattern = mj.VerticalSlash(vertical_size=60, slash_size=60, sink_size=1, window_size=1)
    whole = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=1)

    @jax.jit
    def density(attention):
        return attention.layer(0).attend(q, k, v)[1].density(256, 256)[0, 0]

    assert 0.3 < density(mj.SparseAttention(whole, 16, 16, dense_above=None)) < 1.0
    assert density(mj.SparseAttention(whole, 16, 16, dense_above=0.1)) == 1.0


def test_lists_that_are_kept_are_not_traded_for_dense_attention(monkeypatch):
    """`dense_above=None` keeps them on every device, also where an index cannot pay."""
    monkeypatch.setattr("minference_jax.attention._device_break_even", lambda: 7168)
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=128, heads=1, kv_heads=1))
    whole = mj.HeadPatterns.uniform(
        mj.AShape(sink_size=1, window_size=4), num_layers=1, num_heads=1
    )

    def density(dense_above):
        attention = mj.SparseAttention(whole, 16, 16, dense_above=dense_above).layer(0)
        return attention.attend(q, k, v)[1].density(128, 128)[0, 0]

    assert density(None) < 0.5
    assert density(1.0) == 1.0


def test_a_layer_whose_index_cannot_pay_is_dense():
    """Time of the index: (40 / 256)^2 = 2.4 % of dense attention's, or as much at 256 keys."""
    q, k, v = map(jnp.asarray, random_qkv(0, batch=2, q_len=256, heads=2, kv_heads=1))
    lengths = jnp.array([256, 200])
    narrow = mj.VerticalSlash(vertical_size=8, slash_size=20, sink_size=1, window_size=1)
    wide = mj.VerticalSlash(vertical_size=8, slash_size=80, sink_size=1, window_size=1)

    @functools.partial(jax.jit, static_argnames="break_even")
    def attend(heads, break_even):
        attention = mj.SparseAttention(heads, 16, 16, dense_above=None, break_even=break_even)
        out, index = attention.layer(0).attend(q, k, v, lengths=lengths)
        return out, index.density(256, 256, lengths=lengths)

    model = lambda pattern: mj.HeadPatterns.from_grid([[pattern] * 2], max_columns=8, max_blocks=0)
    exact, sparse = attend(model(narrow), 0)
    assert (np.asarray(sparse) < 0.9).all()
    out, density = attend(model(narrow), 40)
    np.testing.assert_array_equal(density, sparse)
    np.testing.assert_array_equal(out, exact)
    # Budgets that predict a density above 1, and an index that takes as long as dense attention.
    for pattern, break_even in ((wide, 40), (narrow, 256)):
        out, density = attend(model(pattern), break_even)
        np.testing.assert_array_equal(density, 1.0)
        dense = mj.DenseAttention(16, 16)(q, k, v, lengths=lengths)
        np.testing.assert_allclose(out[0], dense[0], atol=2e-6)
        np.testing.assert_allclose(out[1, :200], dense[1, :200], atol=2e-6)
