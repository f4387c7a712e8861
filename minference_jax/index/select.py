"""Selection of the largest scores under a budget that is data, and compaction of masks.

Both count before they look: on a GPU a pass over n numbers is cheaper than a sort of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.tiling import cdiv

# Bits of the threshold found in one pass over the scores (more compare more in fewer passes; 3 was
# measured best on an H200), and bits of a non-negative float.
_DIGIT = 3
_WIDTH = 31

# Marks of a word when a mask is compacted.
_WORD = 32


def top_k_mask(scores: Float[Array, " n"], k: Int[Array, ""]) -> Bool[Array, " n"]:
    """Marks the k largest scores of one head; ties go to the lower position.

    The k-th largest is found digit by digit on the float's bits, so k may differ from head to head
    without a sort and without recompiling.

    Args:
        scores: float32; +inf is taken first, negative ones never.
        k: how many to mark; all that are not negative if there are fewer.

    Returns:
        A mask with exactly min(k, number of non-negative scores) positions.
    """
    bits = _order_bits(scores)
    k = jnp.minimum(k, jnp.sum(bits >= 0))
    threshold = largest_threshold(lambda values: [jnp.sum(bits >= t) >= k for t in values])
    above = bits > threshold
    return _with_ties(above, bits == threshold, k - jnp.sum(above))


def top_mass_count(scores: Float[Array, " n"], mass: Float[Array, ""]) -> Int[Array, ""]:
    """How many of the largest scores it takes to reach a sum of `mass` (one head).

    Args:
        scores: float32; negative ones do not count.
        mass: the sum to reach.

    Returns:
        The size of the smallest such set, the number of marks of `top_mass_mask`.
    """
    above, _, needed = _top_mass(scores, mass)
    return jnp.sum(above) + needed


def top_mass_mask(scores: Float[Array, " n"], mass: Float[Array, ""]) -> Bool[Array, " n"]:
    """Marks the fewest of the largest scores that reach a sum of `mass`; one head.

    Args:
        scores: float32; negative ones are never marked.
        mass: the sum to reach.

    Returns:
        A mask; all scores that are not negative if together they do not reach it. Ties go to the
        lower position.
    """
    return _with_ties(*_top_mass(scores, mass))


def _top_mass(scores, mass):
    """Scores above the last one that is needed, those equal to it, and how many of these."""
    bits = _order_bits(scores)
    sum_of = lambda mask: jnp.sum(jnp.where(mask, scores, 0.0))
    threshold = largest_threshold(lambda values: [sum_of(bits >= t) >= mass for t in values])
    some = mass > 0.0
    above, tied = (bits > threshold) & some, (bits == threshold) & some
    number = jnp.sum(tied)
    value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    needed = jnp.ceil((mass - sum_of(above)) / jnp.where(value > 0.0, value, 1.0))
    needed = jnp.where(value > 0.0, jnp.clip(needed, 0.0, number), number)
    return above, tied, needed.astype(jnp.int32)


def _with_ties(above, tied, wanted):
    last = _nth_marked(tied, jnp.maximum(wanted - 1, 0)[None])[0]
    return above | (tied & (jnp.arange(tied.shape[0]) <= last) & (wanted > 0))


def largest_threshold(
    enough: Callable[[list[Int[Array, " *shape"]]], list[Bool[Array, " *shape"]]],
    shape: tuple[int, ...] = (),
) -> Int[Array, " *shape"]:
    """The largest positive number for which `enough` holds, 0 where there is none.

    Found digit by digit on the bits of a float, so that a budget may be data: `enough` is asked
    about a few thresholds at once and must hold for every number below one for which it holds.
    """
    passes = cdiv(_WIDTH, _DIGIT)

    def refine(i, threshold):
        shift = _DIGIT * (passes - 1 - i)
        # The first pass has fewer bits left than a digit.
        largest = jnp.right_shift(2**_WIDTH - 1, shift)
        digits = range(1, 1 << _DIGIT)
        held = enough([threshold + (digit << shift) for digit in digits])
        steps = [(digit <= largest) & holds for digit, holds in zip(digits, held, strict=True)]
        return threshold + (sum(x.astype(jnp.int32) for x in steps) << shift)

    return jax.lax.fori_loop(0, passes, refine, jnp.zeros(shape, jnp.int32))


def _order_bits(scores):
    """Integers that order as the scores do; -1 for negative ones."""
    return jnp.where(scores >= 0.0, jax.lax.bitcast_convert_type(scores, jnp.int32), -1)


def compact(
    values: Int[Array, " n"], mask: Bool[Array, " n"], size: int, fill: int
) -> Int[Array, " size"]:
    """The marked values in order, in an array of static size; the rest is `fill`."""
    n = values.shape[0]
    if n == 0:
        return jnp.full((size,), fill, jnp.int32)
    at = _nth_marked(mask, jnp.arange(size))
    return jnp.where(at < n, values[jnp.minimum(at, n - 1)], fill)


def _nth_marked(mask: Bool[Array, " n"], number: Int[Array, " m"]) -> Int[Array, " m"]:
    """Position of each number-th mark (from 0); at least n if there are not so many.

    Marks are packed into words: a search among their counts finds the word, halving it the bit. No
    slot reads more than a few words, where a scatter would write every mark.
    """
    words = cdiv(mask.shape[0], _WORD)
    mask = jnp.pad(mask, (0, words * _WORD - mask.shape[0])).reshape(words, _WORD)
    place = jnp.arange(_WORD, dtype=jnp.uint32)[None, :]
    packed = jnp.sum(mask.astype(jnp.uint32) << place, axis=1)
    until = jnp.cumsum(jnp.sum(mask, axis=1))
    at = jnp.searchsorted(until, number, side="right", method="scan_unrolled")
    word = packed[jnp.minimum(at, words - 1)]
    left = number - jnp.where(at > 0, until[jnp.maximum(at - 1, 0)], 0)
    bit = jnp.zeros_like(number)
    for half in (16, 8, 4, 2, 1):
        low = word & jnp.uint32(2**half - 1)
        marks = jax.lax.population_count(low).astype(left.dtype)
        high = left >= marks
        word = jnp.where(high, word >> half, low)
        left, bit = jnp.where(high, left - marks, left), jnp.where(high, bit + half, bit)
    return at * _WORD + bit
