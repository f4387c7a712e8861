"""Independent references in numpy, and the one way in which attention outputs are compared."""

import numpy as np


def random_qkv(seed, *, batch=1, q_len, kv_len=None, heads=4, kv_heads=2, head_dim=16):
    rng = np.random.default_rng(seed)
    kv_len = q_len if kv_len is None else kv_len
    q = rng.standard_normal((batch, q_len, heads, head_dim), np.float32)
    k = rng.standard_normal((batch, kv_len, kv_heads, head_dim), np.float32)
    v = rng.standard_normal((batch, kv_len, kv_heads, head_dim), np.float32)
    return q, k, v


def causal_mask(q_len, kv_len, offset=None):
    offset = kv_len - q_len if offset is None else offset
    return np.arange(kv_len)[None, :] <= offset + np.arange(q_len)[:, None]


def masked_attention(q, k, v, mask):
    """Float64 softmax attention over `mask` [batch, heads, q_len, kv_len], head by head."""
    batch, _, heads, head_dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape, np.float64)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h].astype(np.float64) @ k[b, :, h // group].astype(np.float64).T
            scores = np.where(mask[b, h], scores / np.sqrt(head_dim), -np.inf)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - np.where(np.isinf(top), 0.0, top))
            total = weights.sum(axis=1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            out[b, :, h] = weights @ v[b, :, h // group].astype(np.float64)
    return out


def assert_attention_close(got, want, *, rows=None):
    """float32 agreement: relative RMS under 1e-6 and no element off by more than 1e-5."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if rows is not None:
        got, want = got[:, :rows], want[:, :rows]
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.abs(got - want)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= 1e-5, f"off by {error.max():.2e} at {worst}"
    rms = np.sqrt(np.mean(want**2))
    assert np.sqrt(np.mean(error**2)) <= 1e-6 * max(rms, 1e-2)
