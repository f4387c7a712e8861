"""One budget for many heads, against trying every assignment."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_jax.search import allocate, choose_globally
from tests.core.test_search import synthetic


def best_by_trying(cost, loss, budget):
    """The least total loss that the budget allows."""
    losses = [
        sum(loss[i, at] for i, at in enumerate(picks))
        for picks in itertools.product(range(cost.shape[1]), repeat=len(cost))
        if sum(cost[i, at] for i, at in enumerate(picks)) <= budget + 1e-9
    ]
    return min(losses)


def spent(values, chosen):
    return values[np.arange(len(values)), chosen].sum()


@settings(max_examples=60, deadline=None)
@given(
    drops=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4),
    steps=st.integers(0, 12),
)
def test_least_loss_where_curves_are_convex_and_steps_equal(drops, steps):
    drops = np.sort(np.array(drops, float), axis=1)[:, ::-1]
    loss = 60.0 - np.cumsum(np.pad(drops, ((0, 0), (1, 0))), axis=1)
    cost = np.broadcast_to(1.0 + np.arange(4.0), loss.shape)
    budget = float(len(loss) + steps)
    chosen = allocate(cost, loss, budget)
    assert spent(cost, chosen) <= budget
    assert spent(loss, chosen) == pytest.approx(best_by_trying(cost, loss, budget))


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(1, 4), candidates=st.integers(1, 5), seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
)  # fmt: skip
def test_any_curves_lose_less_than_one_move(items, candidates, seed, share):
    rng = np.random.default_rng(seed)
    cost, loss = rng.random((items, candidates)), rng.random((items, candidates))
    low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    budget = low + share * (high - low)
    chosen = allocate(cost, loss, budget)
    assert spent(cost, chosen) <= budget + 1e-6
    largest = (loss.max(axis=1) - loss.min(axis=1)).max()
    excess = spent(loss, chosen) - best_by_trying(cost, loss, budget)
    assert -1e-9 <= excess <= largest + 1e-9
    # Where the budget is what the moves have used up, nothing is better.
    full = allocate(cost, loss, high)
    assert spent(loss, full) == pytest.approx(loss.min(axis=1).sum())


def test_budget_goes_to_the_heads_and_layers_that_need_it():
    flops = [[0.1, 0.1], [0.5, 0.5]]
    needs_little = synthetic(flops, [[0.99, 0.98], [1.0, 1.0]])
    needs_much = synthetic(flops, [[0.2, 0.95], [0.9, 1.0]])
    layers = [needs_little, needs_much]
    assert choose_globally(layers, "recall", at_most=0.2).tolist() == [[0, 0], [1, 0]]
    assert choose_globally(layers, "recall", at_most=0.3).tolist() == [[0, 0], [1, 1]]
    grouped = [synthetic(x.flops, x.recall, kv_heads=1) for x in layers]
    chosen = choose_globally(grouped, "recall", at_most=0.3, group="kv_group")
    assert chosen.tolist() == [[0, 0], [1, 1]]


def test_budget_below_the_cheapest_is_told():
    scores = synthetic([[0.4, 0.2], [0.6, 0.6]], [[0.5, 0.5], [0.9, 0.9]])
    with pytest.raises(ValueError, match=r"mean cost of 0\.1 .* cheapest candidates cost 0\.3"):
        choose_globally([scores], "recall", at_most=0.1)
