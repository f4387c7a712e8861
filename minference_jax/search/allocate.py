"""One budget for all heads of all layers: spent where it saves most (beyond the paper)."""

import itertools

import numpy as np
from jaxtyping import Float, Int

from minference_jax.search.calibration import Group, pooled
from minference_jax.search.cost import Measure
from minference_jax.search.objective import Objective
from minference_jax.search.scores import LayerScores


def choose_globally(
    layers: list[LayerScores],
    objective: Objective,
    *,
    at_most: float,
    measure: Measure = "flops",
    group: Group = "head",
) -> Int[np.ndarray, "layers heads"]:
    """The candidate of each head, with the least loss in sum that the mean cost allows.

    Args:
        layers: scores of every layer, of candidates that differ in cost.
        objective: what is compared.
        at_most: mean cost of all heads, as a share of dense attention.
        measure: what cost is.
        group: "kv_group" takes one candidate for heads that share keys and values.

    Returns:
        Numbers of candidates.

    Raises:
        ValueError: the cheapest candidates cost more than that.
    """
    step = 1 if group == "head" else layers[0].loss(objective).shape[1] // layers[0].kv_heads

    def table(values):  # [layers * groups, candidates]
        return np.concatenate(
            [pooled(x, layer.kv_heads, group)[:, ::step].T for layer, x in values]
        )

    cost = table([(layer, layer.cost(measure)) for layer in layers])
    loss = table([(layer, layer.loss(objective)) for layer in layers])
    chosen = allocate(cost, loss, at_most * len(cost))
    return np.repeat(chosen.reshape(len(layers), -1), step, axis=1)


def allocate(
    cost: Float[np.ndarray, "items candidates"],
    loss: Float[np.ndarray, "items candidates"],
    budget: float,
) -> Int[np.ndarray, " items"]:
    """Picks one candidate for each item: little loss in sum, for a cost of at most `budget` in sum.

    Every item starts with its cheapest candidate and moves along the lower convex hull of its
    (cost, loss) points; the move that saves most loss for its cost comes first, moves that the
    budget no longer holds are left out. The loss is the least possible if the moves all cost the
    same; otherwise it exceeds that by less than the one move that was left out first saves.

    Args:
        cost: of every candidate.
        loss: likewise.
        budget: most that the picked candidates may cost together.

    Returns:
        Numbers of candidates.

    Raises:
        ValueError: the cheapest candidates cost more than the budget.
    """
    hulls = [_lower_hull(*item) for item in zip(cost, loss, strict=True)]
    chosen = np.array([hull[0] for hull in hulls])
    left = budget * (1 + 1e-9) - cost[np.arange(len(cost)), chosen].sum()
    if left < 0:
        least = (budget - left) / len(cost)
        raise ValueError(
            f"a mean cost of {budget / len(cost):.4g} was asked for, but the cheapest candidates "
            f"cost {least:.4g}; raise the budget, or add cheaper candidates"
        )
    moves = [
        ((loss[item, a] - loss[item, b]) / (cost[item, b] - cost[item, a]), item, a, b)
        for item, hull in enumerate(hulls)
        for a, b in itertools.pairwise(hull)
    ]
    # Moves of one item save less and less, so the sort keeps their order.
    for _, item, a, b in sorted(moves, key=lambda move: -move[0]):
        price = cost[item, b] - cost[item, a]
        if chosen[item] == a and price <= left:
            chosen[item], left = b, left - price
    return chosen


def _lower_hull(
    cost: Float[np.ndarray, " candidates"], loss: Float[np.ndarray, " candidates"]
) -> list[int]:
    """Candidates on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    for at in np.lexsort((loss, cost)):
        if hull and loss[at] >= loss[hull[-1]]:
            continue  # dearer, and no better
        while len(hull) > 1 and _above(cost, loss, hull[-2], hull[-1], at):
            hull.pop()
        hull.append(int(at))
    return hull


def _above(cost, loss, first, middle, last) -> bool:
    """Whether the middle point lies above the line between the others."""
    run, rise = cost[last] - cost[first], loss[last] - loss[first]
    return bool((loss[middle] - loss[first]) * run > rise * (cost[middle] - cost[first]))
