"""One look for all pictures. Drawn without a display."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_MARKERS = "os^vDPX"
_CELLS = 480  # squares along each side of a mask picture: about one per pixel


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of the given size in inches with `rows` of `columns` axes, row by row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as a picture, creating its folder, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path)
    return path


def line_style(number: int) -> dict[str, Any]:
    """Returns colour and marker of one of many lines: no two of 70 look the same."""
    return {"color": f"C{number % 10}", "marker": _MARKERS[number % 7], "markersize": 4}


def log_seconds(axes: Axes) -> None:
    """Makes the upright axis logarithmic, with ticks also where it spans less than a power of ten.

    To be called before minor ticks are switched off.
    """
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")


def wrapped(title: str, figure: Figure) -> str:
    """Returns a title in lines that fit a figure's width at font size 8."""
    width = round(13 * figure.get_figwidth())
    return "\n".join(textwrap.fill(line, width) for line in title.split("\n"))


def short_tokens(number: int) -> str:
    """Returns a number of tokens in three digits: 512, 4.1K, 1M."""
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:g}"


def draw_density(
    axes: Axes,
    density: Float[np.ndarray, "layers heads"],
    title: str,
    label: str = "keys visited, of the causal ones",
) -> None:
    """Draws the share of the causal matrix that each head visits, or executes, as a heat map."""
    num_layers, num_heads = density.shape
    image = axes.imshow(density, vmin=0, vmax=1, cmap="viridis_r", aspect="auto", origin="upper")
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(min(num_heads, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(min(num_layers, 10), integer=True))
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1, decimals=0))
    bar.set_label(label)
    if num_layers * num_heads <= 400:
        for (layer, head), value in np.ndenumerate(density):
            colour = "white" if value > 0.55 else "black"
            axes.text(
                head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=5, c=colour
            )


def draw_mask(axes: Axes, visited: Bool[np.ndarray, "q_len kv_len"], title: str) -> None:
    """Draws the keys that each query of one head visits.

    Long matrices are drawn in cells of several queries and keys, darker the larger the share of the
    cell's causal pairs that is visited; keys in the future are grey.
    """
    shares = visited_shares(visited, _CELLS)
    colours = mpl.colormaps["Blues"].with_extremes(bad="0.88")
    q_len, kv_len = visited.shape
    image = axes.imshow(
        np.sqrt(shares),  # a single visited column or diagonal of a cell stays visible
        vmin=0,
        vmax=1,
        cmap=colours,
        extent=(0, kv_len, q_len, 0),
        aspect="equal" if q_len == kv_len else "auto",
    )
    thousands = EngFormatter(sep="")
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)", title=title)
    axes.xaxis.set_major_formatter(thousands)
    axes.yaxis.set_major_formatter(thousands)
    ticks = np.array([0, 0.05, 0.25, 0.5, 1])
    bar = axes.figure.colorbar(image, ax=axes, ticks=np.sqrt(ticks), shrink=0.85)
    bar.ax.set_yticklabels([f"{100 * tick:.0f}%" for tick in ticks])
    bar.set_label("visited share of the cell")


def visited_shares(
    visited: Bool[np.ndarray, "q_len kv_len"], cells: int
) -> Float[np.ndarray, "rows columns"]:
    """Returns the visited share of the causal pairs in each cell of a coarse grid, NaN where none.

    Args:
        visited: the mask; query i may see keys up to `kv_len - q_len + i`.
        cells: most cells along a side.
    """
    q_len, kv_len = visited.shape
    step = max(1, -(-max(q_len, kv_len) // cells))
    rows, columns = np.arange(0, q_len, step), np.arange(0, kv_len, step)
    hit = np.add.reduceat(visited, columns, axis=1, dtype=np.int32)
    hit = np.add.reduceat(hit, rows, axis=0)
    limit = kv_len - q_len + 1 + np.arange(q_len)  # keys that a query may see
    width = np.minimum(columns + step, kv_len) - columns
    possible = np.clip(limit[:, None] - columns[None, :], 0, width[None, :])
    possible = np.add.reduceat(possible, rows, axis=0)
    return np.where(possible > 0, hit / np.maximum(possible, 1), np.nan)


def density_picture(density: Float[np.ndarray, "layers heads"], *, title: str, path: Path) -> Path:
    """Writes the heat map of all heads' densities."""
    num_layers, num_heads = density.shape
    width, height = 2.6 + 0.22 * num_heads, 1.4 + 0.16 * num_layers
    figure, [axes] = new_figure(min(max(width, 4.5), 10.0), min(max(height, 3.2), 9.0))
    draw_density(axes, density, title)
    return save(figure, path)


def mask_picture(visited: Bool[np.ndarray, "q_len kv_len"], *, title: str, path: Path) -> Path:
    """Writes the picture of one head's visited keys."""
    figure, [axes] = new_figure(6.2, 5.2)
    draw_mask(axes, visited, title)
    return save(figure, path)
