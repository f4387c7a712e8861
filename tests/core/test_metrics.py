"""Metrics against their definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax import metrics
from pallas_kernels.block_sparse_attention.workloads import lines_index
from tests.helpers import causal_mask, masked_attention, random_qkv

Q_LEN, KV_LEN, HEADS = 75, 131, 4
LENGTHS = np.array([131, 100])
# Columns and distances of each head.
LINES = (
    [np.arange(5), np.array([3, 40, 77, 90]), np.arange(0), np.arange(0)],
    [np.arange(10), np.array([0, 30, 31, 70]), np.arange(KV_LEN), np.array([0, 50])],
)


@pytest.fixture(scope="module")
def case():
    """Arrays, a staggered index of heads that differ, its mask, and the causal mask."""
    q, k, v = random_qkv(2, batch=2, q_len=Q_LEN, kv_len=KV_LEN, heads=HEADS, kv_heads=2)
    index = lines_index(*LINES, 2, Q_LEN, KV_LEN, block_q=16, block_kv=16, staggered=True)
    lengths = jnp.asarray(LENGTHS)
    to_mask = jax.jit(lambda index, lengths: index.to_mask(Q_LEN, KV_LEN, lengths=lengths))
    mask = np.array(to_mask(index, lengths))
    causal = causal_mask(Q_LEN, KV_LEN)[None] & (np.arange(KV_LEN) < LENGTHS[:, None, None])
    return q, k, v, index, mask, causal


def log_sum_exp(q, k, mask):
    """Of each row's scaled scores over a mask [batch, heads, q_len, kv_len]."""
    lse = np.zeros((2, HEADS, Q_LEN))
    for b, h in np.ndindex(2, HEADS):
        scores = q[b, :, h].astype(np.float64) @ k[b, :, h // 2].astype(np.float64).T / 4
        lse[b, h] = np.log(np.where(mask[b, h], np.exp(scores), 0.0).sum(axis=1))
    return lse


def test_recall_is_the_mass_inside_the_mask(case):
    q, k, _, index, mask, causal = case
    real = LENGTHS[1] - (KV_LEN - Q_LEN)
    mask[1, :, real:] = causal[1, None, real:]  # rows without a value
    lse, dense = log_sum_exp(q, k, mask), log_sum_exp(q, k, np.stack([causal] * HEADS, axis=1))
    want = np.exp(lse - dense)
    assert want[0].min() < 0.5, "the case must lose mass to mean something"
    recall = functools.partial(metrics.attention_recall, lengths=jnp.asarray(LENGTHS))
    got = np.asarray(jax.jit(recall)(q, k, index))
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1, :, :real], want[1, :, :real], atol=2e-6)
    assert np.isnan(got[1, :, real:]).all()
    rows = jnp.array([3, 70, 12, 3])
    some = np.asarray(jax.jit(recall)(q, k, index, rows=rows))
    np.testing.assert_allclose(some, got[:, :, rows], atol=1e-6)
    by_lse = metrics.lse_recall(jnp.asarray(lse, jnp.float32), jnp.asarray(dense, jnp.float32))
    np.testing.assert_allclose(by_lse, want, atol=2e-6)


def test_recall_of_a_row_that_visits_nothing_is_zero():
    lse = jnp.array([-jnp.inf, 1.0, 2.5])
    np.testing.assert_allclose(metrics.lse_recall(lse, jnp.full(3, 2.0)), [0, np.exp(-1), 1])


def test_output_error(case):
    q, k, v, _, mask, causal = case
    out = masked_attention(q, k, v, mask)
    dense = masked_attention(q, k, v, np.broadcast_to(causal[:, None], mask.shape))
    difference = out - dense
    real = np.arange(Q_LEN)[None, :] < (LENGTHS - (KV_LEN - Q_LEN))[:, None]
    garbage = np.where(real[:, :, None, None], 0.0, 7.0)
    error = jax.jit(functools.partial(metrics.output_error, threshold=0.05))(
        *(jnp.asarray(x, jnp.float32) for x in (out + garbage, dense)), real=jnp.asarray(real)
    )
    for b, h in np.ndindex(2, HEADS):
        delta = difference[b, real[b], h]
        norm = np.linalg.norm(delta) / np.linalg.norm(dense[b, real[b], h])
        np.testing.assert_allclose(error.relative[b, h], norm, atol=1e-5)
        np.testing.assert_allclose(error.far_off[b, h], (np.abs(delta) > 0.05).mean(), atol=1e-3)
    assert float(error.relative[0, 0]) > 0.05
    assert 0.05 < float(error.far_off[0, 0]) < 1.0


def test_next_token_metrics():
    rng = np.random.default_rng(0)
    logits, dense = 3 * rng.standard_normal((2, 3, 70, 50)).astype(np.float32)
    dense[0, 0] = logits[0, 0] + 5.0
    p, q = (np.exp(x.astype(np.float64)) for x in (dense, logits))
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    arrays = (jnp.asarray(logits), jnp.asarray(dense))
    kl = np.asarray(jax.jit(metrics.next_token_kl)(*arrays))
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(axis=-1), rtol=1e-5, atol=1e-5)
    assert kl[0, 0].max() < 1e-5 < kl.mean()
    same = np.asarray(metrics.top1_agreement(*arrays))
    np.testing.assert_array_equal(same, logits.argmax(axis=-1) == dense.argmax(axis=-1))
    assert same[0, 0].all()
    assert not same.all()


def test_recall_streams_over_rows_and_heads(monkeypatch):
    # All scores would be 604 MB for each of two heads.
    monkeypatch.setattr(metrics, "_ELEMENTS", 2**20)
    length = 3 * 2**12
    build = lambda: mj.index.dense_index(1, 2, length, length, block_q=128, block_kv=128)
    arrays = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    lowered = jax.jit(metrics.attention_recall).lower(arrays, arrays, jax.eval_shape(build))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 60e6
