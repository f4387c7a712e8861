"""Selection of the largest scores under a budget that is data, and compaction of masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def top_k_mask(scores: Float[Array, " n"], k: Int[Array, ""]) -> Bool[Array, " n"]:
    """Marks the k largest scores of one head; ties go to the lower position.

    The k-th largest is found by bisection on the float's bits, so k may differ from head to head
    without a sort and without recompiling.

    Args:
        scores: float32; +inf is taken first, negative ones never.
        k: how many to mark; all that are not negative if there are fewer.

    Returns:
        A mask with exactly min(k, number of non-negative scores) positions.
    """
    # The bits of non-negative floats order as the floats do.
    bits = jnp.where(scores >= 0.0, jax.lax.bitcast_convert_type(scores, jnp.int32), -1)
    k = jnp.minimum(k, jnp.sum(bits >= 0))

    def refine(i, threshold):
        candidate = threshold | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= candidate) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
    above = bits > threshold
    tied = bits == threshold
    return above | (tied & (jnp.cumsum(tied) <= k - jnp.sum(above)))


def compact(
    values: Int[Array, " n"], mask: Bool[Array, " n"], size: int, fill: int
) -> Int[Array, " size"]:
    """The marked values in order, in an array of static size; the rest is `fill`."""
    at = jnp.where(mask, jnp.cumsum(mask) - 1, size)
    return jnp.full((size,), fill, jnp.int32).at[at].set(values, mode="drop")
