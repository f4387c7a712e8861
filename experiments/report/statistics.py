"""95 % intervals of means of scores between 0 and 1, and of differences on the same samples."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_Z = 1.959964  # the normal distribution's 97.5 % quantile


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_of(
    values: Float[np.ndarray, " samples"], weights: Float[np.ndarray, " samples"]
) -> Estimate:
    """Returns a weighted mean of independent scores with Wilson's interval.

    Exact in its aim for scores of 0 and 1; scores between vary less, so that it is too wide.

    Args:
        values: between 0 and 1.
        weights: of each; their sum is 1.
    """
    mean, number = float(weights @ values), _number(weights)
    scale = 1 + _Z**2 / number
    centre = (mean + _Z**2 / (2 * number)) / scale
    half = _Z / scale * np.sqrt(max(mean * (1 - mean), 0) / number + _Z**2 / (4 * number**2))
    return Estimate(mean, max(centre - half, 0.0), min(centre + half, 1.0))


def difference_of(
    values: Float[np.ndarray, " samples"],
    others: Float[np.ndarray, " samples"],
    weights: Float[np.ndarray, " samples"],
) -> Estimate:
    """Returns the weighted mean of `values - others`, both of the same samples, and its interval.

    The interval is that of Agresti and Min (2005) for matched pairs: Wald's after two pairs are
    added, half a pair to each outcome. So equal answers to 20 questions prove no equality.

    Args:
        values: between 0 and 1.
        others: of the same samples.
        weights: of each; their sum is 1.
    """
    differences, number = values - others, _number(weights)
    mean = float(weights @ differences)
    total, squares = number * mean, number * float(weights @ differences**2)
    centre = total / (number + 2)
    half = _Z * np.sqrt(squares + 1 - total**2 / (number + 2)) / (number + 2)
    return Estimate(mean, max(centre - half, -1.0), min(centre + half, 1.0))


def _number(weights: Float[np.ndarray, " samples"]) -> float:
    """Samples of equal weight that would know as much."""
    return 1 / float(weights @ weights)
