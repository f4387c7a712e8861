"""Prompts too short to win back the time of an estimate, on devices where that was measured."""

import math

from minference_jax.adaptive.block_threshold import BlockThreshold
from minference_jax.adaptive.layout import Estimator
from minference_jax.adaptive.with_columns import WithColumns
from pallas_kernels.common.environment import not_hopper

# Of one layer on an H200. Prefills of 8,000 tokens by three models with 9 to 14 query heads
# (`experiments/results/h200/compare-*-8k.md`) take 0.21 to 0.38 ms a layer longer than dense ones
# with columns, 0.10 to 0.13 ms less without; with what the kernel saves at the executed shares
# there, the estimates take 0.31 to 0.54 and up to 0.08 ms, whatever the heads. Called alone
# (`break-even.jsonl` beside them), at 8,192 and 16,384 keys, they take 0.28 to 0.42 and 0.12 to
# 0.17 ms with 12 and 14 heads, 0.1 ms of each the call.
_BLOCKS_S, _COLUMNS_S = 0.07e-3, 0.43e-3
# Of dense attention: 600 TFLOP/s with heads of 128, fewer with narrower ones.
_FLOP_PER_S = 5e14


def device_break_even(estimator: Estimator, heads: int, head_dim: int) -> int:
    """Keys up to which one layer of the default device had better attend densely.

    Estimating takes a fixed time, as launches do, and half of the causal pairs may remain to be
    visited, as in prompts of 8,000 tokens. So dense attention must take twice that time. On an H200
    this is, with columns, at 12,700 keys for 12 heads of 128 and at 7,800 for 32 heads of 128.

    Args:
        estimator: only thresholds, alone or with columns, were measured; others have no such bound.
        heads: query heads.
        head_dim: numbers of a head.

    Returns:
        The number of keys; 0 where estimating is not known to be too slow.
    """
    columns = isinstance(estimator, WithColumns)
    blocks = estimator.blocks if columns else estimator
    if not_hopper() or not isinstance(blocks, BlockThreshold):
        return 0
    seconds = _BLOCKS_S + (_COLUMNS_S if columns else 0.0)
    # Dense attention of N keys: two products of N^2 / 2 pairs, 2 FLOP for each number of a head.
    flop_per_squared_key = 2 * heads * head_dim
    return math.isqrt(round(2 * seconds * _FLOP_PER_S / flop_per_squared_key))
