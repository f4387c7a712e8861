"""Pictures of needle-in-a-haystack grids, in the paper's style."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.common.plotting import new_figure, save, short_tokens, wrapped

_COLOURS = LinearSegmentedColormap.from_list("needle", ["#d7403c", "#f2d15c", "#3aa76d"])
_SHARES = Normalize(0, 1)
_LENGTH, _DEPTH = "context length (tokens)", "depth of the needle (%)"
_ACROSS = 4  # grids side by side


def grid_picture(
    grid: Float[np.ndarray, "depths lengths"],
    *,
    depths: list[float],
    lengths: list[int],
    title: str,
    path: Path,
) -> Path:
    """Writes the heat map of scores: length on x, depth on y, from green (1) to red (0).

    Args:
        grid: mean scores, NaN (grey) where there is no sample.
        depths: of the rows, in percent.
        lengths: of the columns, in tokens.
        title: the picture's.
        path: the file.
    """
    width, height = 2.6 + 0.5 * len(lengths), 2.0 + 0.27 * len(depths)
    figure, [axes] = new_figure(max(width, 5.2), max(height, 2.8))
    _draw(axes, grid, depths, lengths)
    axes.set(xlabel=_LENGTH, ylabel=_DEPTH)
    axes.set_title(wrapped(title, figure), fontsize=8)
    _add_bar(figure, axes)
    return save(figure, path)


def grids_picture(
    grids: Mapping[str, Float[np.ndarray, "depths lengths"]],
    *,
    depths: list[float],
    lengths: list[int],
    title: str,
    path: Path,
) -> Path:
    """Writes the heat maps of several methods side by side; see `grid_picture`.

    Args:
        grids: by the title of each.
        depths: of the rows, in percent.
        lengths: of the columns, in tokens.
        title: of all of them.
        path: the file.
    """
    columns = min(_ACROSS, len(grids))
    rows = -(-len(grids) // columns)
    width, height = max(2.2, 0.6 + 0.32 * len(lengths)), 0.9 + 0.17 * len(depths)
    figure, axes = new_figure(0.8 + width * columns, 0.7 + height * rows, columns, rows)
    for number, (part, (name, grid)) in enumerate(zip(axes, grids.items(), strict=False)):
        _draw(part, grid, depths, lengths)
        part.set_title("\n".join(textwrap.wrap(name, round(13 * width))), fontsize=8)
        part.tick_params(labelsize=7)
        if number % columns:
            part.set_yticklabels([])
    for unused in axes[len(grids) :]:
        unused.remove()
    figure.supxlabel(_LENGTH, fontsize=8)
    figure.supylabel(_DEPTH, fontsize=8)
    figure.suptitle(wrapped(title, figure), fontsize=9)
    _add_bar(figure, axes[: len(grids)])
    return save(figure, path)


def _draw(
    axes: Axes,
    grid: Float[np.ndarray, "depths lengths"],
    depths: list[float],
    lengths: list[int],
) -> None:
    axes.pcolormesh(
        np.ma.masked_invalid(grid), norm=_SHARES, cmap=_COLOURS, edgecolors="white", linewidth=0.8
    )
    axes.set_facecolor("0.85")
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [short_tokens(length) for length in lengths])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0f}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def _add_bar(figure: Figure, axes: Axes | list[Axes]) -> None:
    colours = ScalarMappable(_SHARES, _COLOURS)
    bar = figure.colorbar(colours, ax=axes, format=PercentFormatter(xmax=1, decimals=0))
    bar.set_label("needles found")
