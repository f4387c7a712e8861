"""The picture of a needle-in-a-haystack grid, in the paper's style."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import PercentFormatter

from experiments.common.plotting import new_figure, save, short_tokens, wrapped

_COLOURS = LinearSegmentedColormap.from_list("needle", ["#d7403c", "#f2d15c", "#3aa76d"])


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
    image = axes.pcolormesh(
        np.ma.masked_invalid(grid), vmin=0, vmax=1, cmap=_COLOURS, edgecolors="white", linewidth=0.8
    )
    axes.set_facecolor("0.85")
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [short_tokens(length) for length in lengths])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0f}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(xlabel="context length (tokens)", ylabel="depth of the needle (%)")
    axes.set_title(wrapped(title, figure), fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1, decimals=0))
    bar.set_label("needles found")
    return save(figure, path)
