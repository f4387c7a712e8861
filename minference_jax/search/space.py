"""Candidates of the pattern search: the paper's, the released search's, and families to scale."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minference_jax.patterns import (
    BLOCK_SIZE,
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    Kind,
    Pattern,
    TriShape,
    VerticalSlash,
)
from pallas_kernels.common.tiling import cdiv, round_up


def _lines(*sizes: tuple[int, int]) -> tuple[Pattern, ...]:
    return tuple(VerticalSlash(vertical_size=columns, slash_size=rest) for columns, rest in sizes)


# The paper's search space (Table 7).
TABLE_7: tuple[Pattern, ...] = (
    AShape(sink_size=1024, window_size=4096),
    *_lines((30, 2048), (100, 1800), (500, 1500), (3000, 200)),
    BlockSparse(num_blocks=100),
)

# Table 7 and the patterns it leaves out. When budgets are fitted to a cost, only the proportions of
# a pattern's sizes matter.
FAMILIES: tuple[Pattern, ...] = (
    *TABLE_7,
    TriShape(sink_size=128, window_size=3968, last_size=100),
    Dense(),
)


def shipped_space(length: int) -> tuple[Pattern, ...]:
    """The candidates of MInference's released search, `search_pattern`.

    Its block-sparse candidate keeps an eighth of the prompt, so it depends on the length. There a
    head won by A-shape or block-sparse is written down as vertical-slash, and masks are scored
    element by element; here every candidate wins under its own name, by what is executed.
    """
    return (
        AShape(sink_size=100, window_size=800),
        *_lines((30, 800), (100, 750), (500, 700), (3500, 100)),
        BlockSparse(num_blocks=max(1, length // 8 // BLOCK_SIZE)),
    )


def shipped_space_v2() -> tuple[Pattern, ...]:
    """The candidates of `search_pattern_v2`, whose kind of scores the Llama-3-8B files hold."""
    return (
        AShape(sink_size=100, window_size=800),
        *_lines((30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096)),
        BlockSparse(num_blocks=100),
    )


def for_heads(patterns: Sequence[Pattern], num_heads: int) -> HeadPatterns:
    """Every pattern, with the sizes it has, for every head: arrays [candidates, heads]."""
    return HeadPatterns.from_grid([[pattern] * num_heads for pattern in patterns])


def scaled(
    patterns: HeadPatterns, at: Float[np.ndarray, "candidates heads"], *, length: int, most: float
) -> HeadPatterns:
    """Budgets at a point of their range, in the proportions of the patterns' own sizes.

    At 0 a head keeps one line or block; at 1 its largest size covers the prompt. Between, sizes
    grow geometrically. Lines that a pattern forces inside its budget stay as they are.

    Args:
        patterns: [candidates, heads].
        at: the point, 0 to 1.
        length: tokens of the prompt.
        most: the largest share of dense attention that a budget will be allowed. Columns and blocks
            for more than that are cut off, because programs take memory for them.
    """
    lined = (patterns.kind == Kind.A_SHAPE) | (patterns.kind == Kind.TRI_SHAPE)
    columns, blocks = _capacities(length, most)
    sizes = {
        "vertical_size": (patterns.vertical_size, min(length, columns)),
        "slash_size": (patterns.slash_size, length),
        "sink_size": (jnp.where(lined, patterns.sink_size, 0), min(length, columns)),
        "window_size": (jnp.where(lined, patterns.window_size, 0), length),
    }
    keys = jnp.maximum(1, jnp.max(jnp.stack([size for size, _ in sizes.values()]), axis=0))
    factor = jnp.asarray(length**at) / keys
    new = {name: _resized(size, factor, limit) for name, (size, limit) in sizes.items()}
    for name in ("sink_size", "window_size"):
        new[name] = jnp.where(lined, new[name], getattr(patterns, name))
    all_blocks = jnp.asarray(cdiv(length, BLOCK_SIZE) ** at)
    return dataclasses.replace(
        patterns,
        **new,
        last_size=_resized(patterns.last_size, factor, length),
        num_blocks=_resized(
            patterns.num_blocks, all_blocks / jnp.maximum(1, patterns.num_blocks), blocks
        ),
        max_columns=max(columns, int(jnp.max(patterns.sink_size))),
        max_blocks=blocks if patterns.max_blocks else 0,
    )


def _resized(size: Array, factor: Array, limit: int) -> Array:
    new = jnp.clip(jnp.round(size * factor), 1, limit).astype(jnp.int32)
    return jnp.where(size > 0, new, 0)


def _capacities(length: int, most: float) -> tuple[int, int]:
    """Columns and blocks that a share of dense attention can use."""
    share = min(most, 1.0)
    # Columns all over the prompt visit their share of it; twice that, for late ones cost less.
    columns = max(1, min(length, math.ceil(2.0 * share * length)))
    # A budget of a share b of the blocks visits 2b - b^2 of the causal matrix.
    blocks = math.ceil(length / BLOCK_SIZE * (1.0 - math.sqrt(1.0 - share))) + 4
    return round_up(columns, 128), min(blocks, cdiv(length, BLOCK_SIZE))
