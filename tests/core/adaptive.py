"""The prompts on which the adaptive patterns are tested."""

import functools

import numpy as np

import minference_jax as mj
from tests.helpers import random_qkv

Q_LEN, KV_LEN, HEADS, KV_HEADS = 77, 141, 4, 2
LENGTHS = np.array([141, 129])
REAL = LENGTHS - (KV_LEN - Q_LEN)
LAYOUT = mj.Layout(block_q=32, block_kv=16, max_blocks=9)

# Scores of two query tiles at a time: the last step is short and begins before its rows.
ELEMENTS = 2 * 2 * HEADS * 32 * 9


@functools.cache
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
