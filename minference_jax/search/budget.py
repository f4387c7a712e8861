"""Budgets that make every candidate cost the same (paper, Algorithm 1)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.index.lines import LAST_Q, last_query_scores
from minference_jax.patterns import Dense, HeadPatterns, Pattern, VerticalSlash
from minference_jax.search.calibration import (
    Calibration,
    Calibrations,
    Group,
    Kernel,
    each,
    pooled,
    summed,
)
from minference_jax.search.cost import Measure, Work, work_of
from minference_jax.search.space import for_heads, scaled
from pallas_kernels.block_sparse_attention.index import resolve_lengths

# Halvings of the range of budgets: at 128K tokens the last step changes a size by 1.2 %.
_STEPS = 10


def fit_budgets(
    families: Sequence[Pattern],
    prompts: Calibrations,
    *,
    target: float | Sequence[float],
    measure: Measure = "flops",
    group: Group = "head",
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> HeadPatterns:
    """Scales every family's budgets to what `target` allows, for each head of a layer.

    What counts is what the kernel executes for the calibration prompts' own index, all prompts
    together. Budgets are found by bisection, which never attends: a candidate costs at most the
    target, unless the smallest budget costs more already. Dense heads stay dense.

    The prompts are read once. Only lines are searched in them, and the scores of all lines (two
    numbers for each key of each head) are kept; what other patterns cost follows from the lengths,
    so that it is computed once for all layers.

    Args:
        families: one pattern for each candidate; only the proportions of its sizes count.
        prompts: the layer's calibration prompts.
        target: share of dense attention's work, above 0; one for all or one for each candidate.
        measure: what is counted as work.
        group: "kv_group" gives heads that share keys and values the same budget.
        kernel: how the attention will be executed.

    Returns:
        Patterns [candidates, heads].

    Raises:
        ValueError: a target is not above 0, or there are no prompts.
        TypeError: `prompts` can be iterated only once.
    """
    goal = np.broadcast_to(np.asarray(target, np.float64), (len(families),))
    if np.any(goal <= 0):
        raise ValueError(f"`target` must be above 0, got {target}")
    searched = np.array([isinstance(family, VerticalSlash) for family in families])
    looks = [_look(prompt, lines=bool(searched.any())) for prompt in each(prompts)]
    length, (heads, kv_heads) = max(look.length for look in looks), looks[0].heads
    most = max((x for p, x in zip(families, goal, strict=True) if p != Dense()), default=0.0)
    of = lambda which: tuple(family for family, own in zip(families, which, strict=True) if own)

    def share(at):
        patterns = scaled(lines, at, length=length, most=most)
        work: list[Work] = [
            _work_of_lines(patterns, look.lines, look.lengths, measure=measure, kernel=kernel)
            for look in looks
        ]
        return pooled(_share(work), kv_heads, group)

    at = np.zeros((len(families), heads))
    if searched.any():
        lines = for_heads(of(searched), heads)
        at[searched] = _largest_that_fits(share, goal[searched][:, None], (heads,))
    if not searched.all():
        lengths = tuple((look.length, tuple(look.lengths.tolist())) for look in looks)
        costs = tuple(goal[~searched].tolist())
        fit = functools.partial(_fit_to_lengths, most=most, measure=measure, kernel=kernel)
        at[~searched] = fit(of(~searched), costs, lengths)
    return scaled(for_heads(families, heads), at, length=length, most=most)


def _largest_that_fits(
    share: Callable[[np.ndarray], np.ndarray], goal: np.ndarray, heads: tuple[int, ...]
) -> np.ndarray:
    """Points between 0 and 1 [candidates, *heads], by bisection; `share` grows with them."""
    low, high = np.zeros((len(goal), *heads)), np.ones((len(goal), *heads))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = share(middle) <= goal
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


@functools.lru_cache(maxsize=32)
def _fit_to_lengths(families, goal, lengths, *, most, measure, kernel):
    """The points [candidates, 1] of families whose cost does not depend on queries and keys."""
    base, length = for_heads(families, 1), max(padded for padded, _ in lengths)
    prompts = []
    for padded, own in lengths:
        nothing = jnp.zeros((len(own), padded, 1, 8))
        prompts.append(Calibration(nothing, nothing, nothing, jnp.array(own, jnp.int32)))

    def share(at):
        patterns = scaled(base, at, length=length, most=most)
        return executed_share(patterns, prompts, measure=measure, kernel=kernel)

    return _largest_that_fits(share, np.array(goal)[:, None], (1,))


def executed_share(
    candidates: HeadPatterns,
    prompts: Calibrations,
    *,
    measure: Measure = "flops",
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> Float[np.ndarray, "candidates heads"]:
    """Work of the candidates [candidates, heads] on all prompts, as a share of dense attention."""
    run = functools.partial(_work, measure=measure, kernel=kernel)
    sparse, dense = summed(prompts, lambda prompt: run(candidates, *prompt[:2], prompt.lengths))
    return sparse / dense


def smallest_share(
    families: Sequence[Pattern],
    length: int,
    *,
    measure: Measure = "flops",
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> float:
    """The least that any of the families costs on a prompt of `length` tokens.

    With the smallest budgets, what is executed does not depend on the prompt.
    """
    nothing = jnp.zeros((1, length, 1, 8))
    smallest = scaled(
        for_heads(families, num_heads=1), np.zeros((len(families), 1)), length=length, most=0.0
    )
    prompts = [Calibration(nothing, nothing, nothing)]
    return float(executed_share(smallest, prompts, measure=measure, kernel=kernel).min())


class _Look(NamedTuple):
    """What fitting budgets needs of a batch of prompts."""

    length: int
    heads: tuple[int, int]  # query heads, key/value heads
    lengths: Int[Array, " batch"]
    lines: tuple[Array, Array] | None


def _look(prompt: Calibration, *, lines: bool) -> _Look:
    batch, length, heads, _ = prompt.q.shape
    lengths, _ = resolve_lengths(batch, length, length, prompt.lengths, None)
    scores = _line_scores(prompt.q, prompt.k, lengths) if lines else None
    return _Look(length, (heads, prompt.k.shape[2]), lengths, scores)


@jax.jit
def _line_scores(q, k, lengths):
    return last_query_scores(q, k, lengths=lengths, q_offset=jnp.int32(0), last_q=LAST_Q)


@functools.partial(jax.jit, static_argnames=("measure", "kernel"))
def _work_of_lines(candidates, scores, lengths, *, measure, kernel):
    batch, heads, length = scores[0].shape
    # Only their shapes are read.
    q, k = jnp.zeros((batch, length, heads, 1)), jnp.zeros((batch, length, 1, 1))

    def one(patterns):
        index = kernel.index(patterns, q, k, lengths=lengths, line_scores=scores)
        return work_of(index, length, lengths, measure)

    return jax.lax.map(one, candidates)


@functools.partial(jax.jit, static_argnames=("measure", "kernel"))
def _work(candidates, q, k, lengths, *, measure, kernel):
    def one(patterns):
        index = kernel.index(patterns, q, k, lengths=lengths)
        return work_of(index, q.shape[1], lengths, measure)

    return jax.lax.map(one, candidates)


def _share(work: list[Work]) -> Float[np.ndarray, "candidates heads"]:
    sparse, dense = (
        np.sum([np.asarray(x) for x in parts], axis=0, dtype=np.float64)
        for parts in zip(*jax.device_get(work), strict=True)
    )
    return sparse / dense
