"""Pictures of reports."""

import numpy as np
import pytest

from experiments.report.pictures import spread


def test_labels_keep_their_order_and_their_distance():
    heights = {"a": 0.98, "b": 0.97, "c": 0.1, "d": 0.99, "e": 0.12, "f": 0.5}
    placed = spread(heights, gap=0.05)
    order = sorted(heights, key=lambda label: heights[label])
    assert sorted(placed, key=lambda label: placed[label]) == order
    at = [placed[label] for label in order]
    assert min(np.diff(at)) > 0.05 - 1e-9
    assert at[0] >= 0
    assert at[-1] <= 1 + 1e-9
    assert placed["f"] == pytest.approx(0.5)  # has room
