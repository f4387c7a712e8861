"""Intervals of means and of differences, by their definitions."""

import numpy as np
import pytest

from experiments.report.statistics import difference_of, mean_of


def test_wilsons_interval_ends_where_the_share_is_just_not_refuted():
    values = np.array([1.0] * 7 + [0.0] * 3)
    mean, low, high = mean_of(values, np.full(10, 0.1))
    assert mean == pytest.approx(0.7)
    for end in (low, high):  # its definition
        assert abs(0.7 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 10))
    assert low < 0.7 < high
    assert mean_of(np.ones(20), np.full(20, 0.05)).low < 0.9  # 20 of 20 prove no certainty


def test_the_interval_of_a_difference_is_agresti_and_mins():
    both, first, second, neither = 11, 6, 2, 5
    values = np.repeat([1.0, 1.0, 0.0, 0.0], [both, first, second, neither])
    others = np.repeat([1.0, 0.0, 1.0, 0.0], [both, first, second, neither])
    # Wald's interval of the table with half a pair more in each of its four cells.
    b, c, n = first + 0.5, second + 0.5, len(values) + 2
    centre, half = (b - c) / n, 1.959964 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    ours = difference_of(values, others, np.full(len(values), 1 / len(values)))
    assert ours == pytest.approx((4 / 24, centre - half, centre + half))


@pytest.mark.parametrize(("samples", "right", "turned"), [(20, 0.9, 0.02), (60, 0.5, 0.3)])
def test_the_interval_of_a_difference_covers_it(samples, right, turned):
    rng, trials = np.random.default_rng(0), 1000
    true = (1 - 2 * right) * turned
    covered = plain = 0
    for _ in range(trials):
        others = (rng.random(samples) < right).astype(float)
        values = np.where(rng.random(samples) < turned, 1 - others, others)
        _, low, high = difference_of(values, others, np.full(samples, 1 / samples))
        covered += low <= true <= high
        error = np.std(values - others) / np.sqrt(samples)
        plain += abs(np.mean(values - others) - true) <= 1.96 * error
    assert covered / trials >= 0.95
    # What a standard error alone would claim when few answers turn.
    assert turned > 0.1 or plain / trials < 0.5


def test_samples_of_unlike_weight_count_as_fewer():
    values = np.array([1.0, 0.0, 1.0, 0.0])
    even = mean_of(values, np.full(4, 0.25))
    uneven = mean_of(values, np.array([0.45, 0.45, 0.05, 0.05]))
    assert uneven.high - uneven.low > even.high - even.low
