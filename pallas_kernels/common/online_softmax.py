"""One step of the online softmax (FlashAttention), shared by every implementation."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A finite stand-in for -inf: differences of two masked scores stay finite (0), never NaN.
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)

LOG2E = math.log2(math.e)


def init(
    rows: int, head_dim: int
) -> tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, "rows head_dim"]]:
    """The state (m, l, acc) before any key: running maximum, sum of weights, weighted values."""
    return (
        jnp.full((rows,), MASK_VALUE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )


def step(
    state: tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, "rows head_dim"]],
    scores: Float[Array, "rows keys"],
    visible: Bool[Array, "rows keys"],
    values: Float[Array, "keys head_dim"],
) -> tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, "rows head_dim"]]:
    """Adds a set of keys to the state. `scores` are in log2 units (scaled by log2 e)."""
    m, l, acc = state
    scores = jnp.where(visible, scores, MASK_VALUE)
    m_new = jnp.maximum(m, jnp.max(scores, axis=1))
    alpha = jnp.exp2(m - m_new)
    # A row that has seen no key has m_new == MASK_VALUE and would weigh masked keys by exp2(0).
    weights = jnp.where(visible, jnp.exp2(scores - m_new[:, None]), 0.0)
    l = l * alpha + jnp.sum(weights, axis=1)
    acc = acc * alpha[:, None] + jnp.dot(weights, values, preferred_element_type=jnp.float32)
    return m_new, l, acc


def finish(
    state: tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, "rows head_dim"]],
) -> tuple[Float[Array, "rows head_dim"], Float[Array, " rows"]]:
    """Output and natural-log log-sum-exp; a row that saw no key gives 0 and -inf."""
    m, l, acc = state
    seen = l > 0.0
    out = acc / jnp.where(seen, l, 1.0)[:, None]
    lse = jnp.where(seen, m / LOG2E + jnp.log(jnp.where(seen, l, 1.0)), -jnp.inf)
    return out, lse
