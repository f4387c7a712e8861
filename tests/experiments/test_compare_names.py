"""Names in a picture of a comparison: where they stand, and which stand together."""

import itertools

import numpy as np

from experiments.common.plotting import new_figure
from experiments.compare.names import Name, write_names


def test_names_cover_neither_each_other_nor_points_and_stay_inside():
    figure, [axes] = new_figure(5.6, 5.0)
    crowd = np.random.default_rng(0).uniform(0.55, 0.75, (12, 2))
    # At the corner, where all methods meet that visit every key.
    points = [*crowd, *[(1.0, 0.0)] * 3, (0.0, 1.0)]
    axes.plot(*zip(*points, strict=True), "o", markersize=5)
    axes.plot([0.5, 0.8], [0.5, 0.8])
    figure.draw_without_rendering()
    before = axes.get_position().bounds
    names = [Name(f"name {n}", f"family:name {n}", at, "C0") for n, at in enumerate(points)]
    write_names(axes, names)
    figure.draw_without_rendering()
    assert axes.get_position().bounds == before
    texts = [text for text in axes.texts if text.get_text()]
    together = "family:name 12\nfamily:name 13\nfamily:name 14"
    assert together in [text.get_text() for text in texts]
    assert sum(len(text.get_text().split("\n")) for text in texts) == len(points)
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(at)) for box in boxes for at in points)
    inside = axes.get_window_extent()
    assert all(inside.contains(*corner) for box in boxes for corner in box.corners())
