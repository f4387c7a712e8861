"""Budgets that make every candidate cost the same (paper, Algorithm 1)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minference_jax.patterns import Dense, HeadPatterns, Pattern
from minference_jax.search.calibration import (
    Calibration,
    Calibrations,
    Group,
    Kernel,
    each,
    pooled,
    summed,
)
from minference_jax.search.cost import Measure, work_of
from minference_jax.search.space import for_heads, scaled

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
    together. Budgets are found by bisection, which reads the prompts ten times and never attends: a
    candidate costs at most the target, unless the smallest budget costs more already. Dense heads
    stay dense.

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
    goal = np.broadcast_to(np.asarray(target, np.float64), (len(families),))[:, None]
    if np.any(goal <= 0):
        raise ValueError(f"`target` must be above 0, got {target}")
    length, heads, kv_heads = _extent(prompts)
    base = for_heads(families, heads)
    most = max((x for p, [x] in zip(families, goal, strict=True) if p != Dense()), default=0.0)
    at = functools.partial(scaled, base, length=length, most=float(most))
    low, high = np.zeros(base.kind.shape), np.ones(base.kind.shape)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        share = executed_share(at(middle), prompts, measure=measure, kernel=kernel)
        fits = pooled(share, kv_heads, group) <= goal
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return at(low)


def executed_share(
    candidates: HeadPatterns,
    prompts: Calibrations,
    *,
    measure: Measure = "flops",
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> Float[np.ndarray, "candidates heads"]:
    """Work of the candidates [candidates, heads] on all prompts, as a share of dense attention."""
    attention = kernel.attention(candidates)
    sparse, dense = summed(prompts, lambda prompt: _work(attention, *prompt[:4], measure=measure))
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


@functools.partial(jax.jit, static_argnames="measure")
def _work(candidates, q, k, v, lengths, *, measure):
    def one(attention):
        # The compiler drops the attention, whose output is not used.
        _, index = attention.attend(q, k, v, lengths=lengths)
        return work_of(index, q.shape[1], lengths, measure)

    return jax.lax.map(one, candidates)


def _extent(prompts: Calibrations) -> tuple[int, int, int]:
    """The largest length, and how many heads and key/value heads there are."""
    shapes = [(prompt.q.shape, prompt.k.shape) for prompt in each(prompts)]
    length = max(q[1] for q, _ in shapes)
    (_, _, heads, _), (_, _, kv_heads, _) = shapes[0]
    return length, heads, kv_heads
