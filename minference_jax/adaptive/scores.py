"""Products and softmax of estimates, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.online_softmax import MASK_VALUE


def products(
    rows: Float[Array, "*rows width"], keys: Float[Array, "keys width"]
) -> Float[Array, "*rows keys"]:
    """Products of all pairs; exact products of 16-bit numbers, float32 without shortcuts."""
    precision = "highest" if keys.dtype == jnp.float32 else "default"
    return jnp.dot(rows, keys.T, precision=precision, preferred_element_type=jnp.float32)


def masked_softmax(
    scores: Float[Array, "*shape keys"], visible: Bool[Array, "*#shape keys"]
) -> Float[Array, "*shape keys"]:
    """Softmax over what is visible; 0 elsewhere, and everywhere if nothing is."""
    scores = jnp.where(visible, scores, MASK_VALUE)
    weights = jnp.where(visible, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    # A visible maximum weighs 1, so only an empty sum is below 1.
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
