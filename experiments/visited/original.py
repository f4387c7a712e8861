"""What the original project's kernel visits for a head's lines, in numpy.

Its index conversion walks the slashes of each block of 64 query rows from far to near. A slash at
distance s reaches keys [e - 64, e) with e = max(end - s, 64), `end` being the position after the
block. A range of keys grows by 64 while the next slash ends at most 64 keys after it (and beyond
it); a slash further on begins a new range. Columns outside all ranges are visited one by one.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

BLOCK = 64


class Pairs(NamedTuple):
    """(Query, key) pairs of one head.

    Attributes:
        visited: causal pairs inside the ranges and columns.
        executed: pairs that the kernel computes: whole tiles, and columns in groups of 64.
    """

    visited: int
    executed: int


def original_pairs(columns: Bool[np.ndarray, " n"], distances: Bool[np.ndarray, " n"]) -> Pairs:
    """Counts the pairs of one head over n tokens.

    Args:
        columns: the chosen key columns.
        distances: the chosen distances (query row - key column); 0 must be among them.

    Raises:
        ValueError: distance 0 is missing, so that a block of rows may have no range.
    """
    length = len(distances)
    if not distances[0]:
        raise ValueError("distance 0 must be chosen: every row sees itself")
    chosen = np.flatnonzero(distances)
    before = np.concatenate([[0], np.cumsum(columns)])  # chosen columns before a key
    count = lambda low, high: before[np.minimum(high, length)] - before[np.minimum(low, length)]
    end = BLOCK * (1 + np.arange(-(-length // BLOCK)))
    rows = np.minimum(end, length) - (end - BLOCK)

    high = np.maximum(end - chosen[np.searchsorted(chosen, end) - 1], BLOCK)
    low = high - BLOCK
    ranges = np.zeros_like(end)
    visited = np.zeros_like(end)
    singles = np.zeros_like(end)
    singles += count(0, low)
    while True:
        nearer = np.searchsorted(chosen, end - high) - 1  # the next slash that ends beyond `high`
        if np.all(nearer < 0):
            break
        reach = np.where(nearer >= 0, end - chosen[nearer], high)
        away = reach > high + BLOCK
        visited += np.where(away, _causal(low, high, end, rows), 0)
        ranges += np.where(away, high - low, 0)
        singles += np.where(away, count(high, reach - BLOCK), 0)
        grown = np.where(nearer >= 0, high + BLOCK, high)
        low, high = np.where(away, reach - BLOCK, low), np.where(away, reach, grown)
    visited += _causal(low, high, end, rows) + singles * rows
    executed = ranges + (high - low) + -(-singles // BLOCK) * BLOCK
    return Pairs(visited=int(visited.sum()), executed=int(executed.sum()) * BLOCK)


def _causal(
    low: Int[np.ndarray, " blocks"],
    high: Int[np.ndarray, " blocks"],
    end: Int[np.ndarray, " blocks"],
    rows: Int[np.ndarray, " blocks"],
) -> Int[np.ndarray, " blocks"]:
    """Pairs of each block's rows with the keys of [low, high) at or before them."""

    def total(seen):  # of rows that see up to 1, 2, …, `seen` keys from `low` on
        inside = np.clip(seen, 0, high - low)
        return inside * (inside + 1) // 2 + np.maximum(seen - (high - low), 0) * (high - low)

    first = end - BLOCK + 1 - low
    return total(first + rows - 1) - total(first - 1)
