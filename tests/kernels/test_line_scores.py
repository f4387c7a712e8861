"""Column and diagonal sums against a numpy brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import line_scores
from pallas_kernels.line_scores import xla


def brute_force(q, k, first, length):
    """One head, element by element in float64."""
    vertical, slash = np.zeros(len(k)), np.zeros(len(k))
    for row, query in enumerate(q.astype(np.float64)):
        position = first + row
        if position >= length:
            continue
        scores = k[: position + 1].astype(np.float64) @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        for key, weight in enumerate(weights):
            vertical[key] += weight
            slash[position - key] += weight
    return vertical, slash


CASES = [
    pytest.param(1, 1, [1, 1], [0, 0], id="one-token"),
    pytest.param(7, 50, [50, 44], [43, 37], id="short-chunks"),
    pytest.param(64, 200, [200, 150], [136, 86], id="ragged-rows"),
    pytest.param(16, 64, [64, 5], [48, 0], id="row-shorter-than-last-q"),
]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("last_q", "kv_len", "lengths", "first"), CASES)
def test_line_scores_equal_brute_force(monkeypatch, implementation, last_q, kv_len, lengths, first):
    monkeypatch.setattr(xla, "_CHUNK", 32)
    rng = np.random.default_rng(last_q)
    q = rng.standard_normal((2, last_q, 4, 8), np.float32) * 2
    k = rng.standard_normal((2, kv_len, 2, 8), np.float32)
    vertical, slash = line_scores(
        jnp.asarray(q), jnp.asarray(k), first=jnp.asarray(first), lengths=jnp.asarray(lengths),
        implementation=implementation,
    )  # fmt: skip
    for b, h in np.ndindex(2, 4):
        want = brute_force(q[b, :, h], k[b, :, h // 2], first[b], lengths[b])
        np.testing.assert_allclose(vertical[b, h], want[0], atol=2e-6)
        np.testing.assert_allclose(slash[b, h], want[1], atol=2e-6)


def test_sums_are_the_number_of_real_queries():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 64, 2, 16), np.float32))
    k = jnp.asarray(rng.standard_normal((1, 3000, 1, 16), np.float32))
    vertical, slash = line_scores(q, k, first=jnp.array([2900]), lengths=jnp.array([2950]))
    np.testing.assert_allclose(jnp.sum(vertical, axis=2), 50.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(slash, axis=2), 50.0, rtol=1e-5)


def test_line_scores_refuse_heads_that_do_not_group():
    with pytest.raises(ValueError, match="multiple of"):
        line_scores(
            jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 8, 2, 8)), first=jnp.array([4]),
            lengths=jnp.array([8]),
        )  # fmt: skip
