"""Names beside the points of a picture, where they cover least of what is there."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

# Lengths are in points.
_RADIUS = 2.5  # of a marker
_SAME = 3.0  # points so near are named together
_CLOSE = 9.0  # a name so near needs no line from its point
_SAMPLES = 40  # of each piece of a line
# Ways from a point to its name that are tried; of equally good ones the first is taken.
_SIDES = [side * aside for aside in (5, 12, 20, 30, 45, 65, 90) for side in (1, -1)]
_WAYS = np.array([*itertools.product(_SIDES, range(-100, 101, 4))], float)


class Name(NamedTuple):
    """What a point, in data coordinates, is called: alone, where its colour tells its family."""

    alone: str
    whole: str
    at: tuple[float, float]
    colour: Any


def write_names(axes: Axes, names: Sequence[Name]) -> None:
    """Writes names, and leads thin lines to those that cannot stand close to their points.

    All else must be drawn, and the figure laid out; names do not change its layout.
    """
    scale = 72 / axes.figure.dpi
    place = lambda name: axes.transData.transform(name.at) * scale
    extents = lambda artist: np.array(artist.get_window_extent().extents) * scale
    inside, boxes = extents(axes), [extents(text) for text in axes.texts]
    boxes += [np.concatenate([place(x) - _RADIUS, place(x) + _RADIUS]) for x in names]
    drawn = []
    for line in axes.get_lines():
        path = line.get_transform().transform(line.get_xydata()) * scale
        drawn.append(_sampled(path) if line.get_linewidth() else path)
    for together in _together(names, place):
        first, *others = together
        text = "\n".join(name.whole for name in together) if others else first.alone
        written = axes.annotate(
            text, first.at, xytext=(0, 0), textcoords="offset points", va="center", color="0.25",
            fontsize=6, in_layout=False,
        )  # fmt: skip
        at, (left, low, right, high) = place(first), extents(written)
        found = _boxes(at, np.array([right - left, high - low]))
        leaders = at + _WAYS[:, None] * np.linspace(1.5 * _RADIUS / _far(_WAYS), 1, 20).T[..., None]
        taken = np.array(boxes)
        outside = np.any((found[:, :2] < inside[:2]) | (found[:, 2:] > inside[2:]), axis=1)
        over = np.sum(_overlap(found[:, None], taken), axis=1)
        crossed = np.sum(np.any(_within(leaders[:, :, None], taken, 0.5), axis=1), axis=1)
        hidden = np.sum(_within(np.concatenate(drawn), found[:, None], 2.5), axis=1)
        costs = 1e6 * outside + 1e3 * (over + crossed) + hidden + _far(_WAYS) / 4
        best = np.argmin(costs)
        way = _WAYS[best]
        written.set(position=way, horizontalalignment="left" if way[0] > 0 else "right")
        boxes.append(found[best])
        if _far(way) > _CLOSE:
            drawn.append(leaders[best])
            line = {"arrowstyle": "-", "color": first.colour, "linewidth": 0.6}
            axes.annotate(
                "", first.at, xytext=way, textcoords="offset points", in_layout=False,
                arrowprops=line | {"shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def _together(names: Sequence[Name], place: Callable[[Name], Any]) -> list[list[Name]]:
    """Names by their points: those with most names first, then the uppermost."""
    found: list[list[Name]] = []
    for name in sorted(names, key=lambda name: -place(name)[1]):
        near = (same for same in found if _far(place(same[0]) - place(name)) < _SAME)
        if same := next(near, None):
            same.append(name)
        else:
            found.append([name])
    return sorted(found, key=len, reverse=True)


def _boxes(at: Float[np.ndarray, " 2"], size: Float[np.ndarray, " 2"]) -> Float[np.ndarray, "n 4"]:
    """Left, lower, right and upper edges of a name at the end of each way."""
    low = at + _WAYS - size * np.stack([_WAYS[:, 0] < 0, np.full(len(_WAYS), 0.5)], axis=1)
    return np.concatenate([low, low + size], axis=1)


def _far(way: Float[np.ndarray, "*n 2"]) -> Any:
    return np.hypot(way[..., 0], way[..., 1])


def _overlap(one: Float[np.ndarray, "*n 4"], other: Float[np.ndarray, "*m 4"]) -> Any:
    return np.all((one[..., :2] < other[..., 2:]) & (one[..., 2:] > other[..., :2]), axis=-1)


def _within(
    points: Float[np.ndarray, "*n 2"], box: Float[np.ndarray, "*m 4"], margin: float
) -> Any:
    """Whether points are in boxes with a margin around them."""
    around = np.array([-margin, -margin, margin, margin])
    return _overlap(np.concatenate([points, points], axis=-1), box + around)


def _sampled(line: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """Points along a line."""
    pieces = len(line) - 1
    where = np.linspace(0, pieces, _SAMPLES * pieces + 1)
    return np.stack([np.interp(where, np.arange(pieces + 1), x) for x in line.T], axis=1)
