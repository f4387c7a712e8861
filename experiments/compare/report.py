"""A comparison's rows as a table, and what is made from its record: Markdown and a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from experiments.common.methods import FROM_FILE
from experiments.common.plotting import new_figure, save
from experiments.compare.names import Name, write_names
from experiments.compare.rows import Row, read_all
from experiments.compare.summary import Group, Line, markdown, summarise

# Divergences below this are rounding: a logarithm needs a floor.
_FLOOR = 1e-5  # other kernels differ by more
# Columns of text that the tables need.
WIDTH = 120
_MARKERS = "os^vDPX<>*phd"


def table(rows: Sequence[Row]) -> Table:
    """All rows, prompt after prompt."""
    result = Table(box=None, pad_edge=False)
    result.add_column("method", no_wrap=True)
    for name in ("executed", "visited", "KL", "top-1", "perplexity", "answer", "right", "prefill"):
        result.add_column(name, justify="right", no_wrap=True)
    for prompt in dict.fromkeys(row.point.prompt for row in rows):
        result.add_row(f"[bold]{prompt}[/bold]")
        for row in rows:
            if row.point.prompt == prompt:
                result.add_row(f"  {row.point.method}", *_cells(row.result))
    return result


def _cells(result: dict[str, Any]) -> list[str]:
    answer, right = result["answer_probability"], result["answer_right"]
    return [
        f"{result['executed']:.1%}",
        f"{result['visited']:.1%}",
        f"{result['kl']:.2g}",
        f"{result['top1']:.1%}",
        f"{result['perplexity']:.3f}",
        "" if answer is None else f"{answer:.3f}",
        "" if right is None else ("yes" if right else "no"),
        f"{np.median(result['prefill_seconds']):.3g} s",
    ]


def write_report(record: Path) -> tuple[dict[Group, list[Line]], list[Path]]:
    """Makes Markdown and picture from the record alone, beside it.

    Returns:
        The lines of each model and length, and the paths written; neither if there is no row.

    Raises:
        UserError: the record cannot be read.
    """
    groups = summarise(read_all(record))
    if not groups:
        return {}, []
    text = record.with_suffix(".md")
    text.write_text(markdown(groups), encoding="utf-8")
    return groups, [text, picture(groups, path=record.with_suffix(".png"))]


def picture(groups: dict[Group, list[Line]], *, path: Path) -> Path:
    """Writes the picture: divergence from dense against what is executed, a line for each family.

    Every point is a mean over prompts.
    """
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure, axes = new_figure(5.6 * across + 1.6, 5.0 * down, across, down)
    families = dict.fromkeys(line.family for lines in groups.values() for line in lines)
    order = [family for family in families if family != "dense"]
    names = []
    for part, (group, lines) in zip(axes, groups.items(), strict=False):
        names.append(draw_quality(part, lines, order))
        part.set_title(textwrap.fill(group.title, 70), fontsize=9)
    for unused in axes[len(groups) :]:
        unused.set_axis_off()
    drawn = {line.get_label(): line for part in axes for line in part.get_lines()}
    handles = [drawn[family] for family in order]
    if handles:
        figure.legend(handles, order, frameon=False, fontsize=7, loc="outside right upper")
    figure.draw_without_rendering()  # names go by where all else lies
    for part, of_part in zip(axes, names, strict=False):
        write_names(part, of_part)
    return save(figure, path)


def draw_quality(axes: Axes, lines: Sequence[Line], order: Sequence[str]) -> list[Name]:
    """Draws one group, and returns the names of its points; nothing diverges from dense attention.

    Args:
        axes: where.
        lines: of the group.
        order: families, which take their colours and markers in this order.
    """
    axes.set_yscale("log")
    colours = mpl.colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])
    names = []
    for number, family in enumerate(order):
        found = [line for line in lines if line.family == family]
        if not found:
            continue
        x = [line.executed for line in found]
        y = [max(line.kl, _FLOOR) for line in found]
        style = {"color": colours[number % len(colours)], "marker": _MARKERS[number % 13]}
        # Files are no budgets of one method: no line joins them.
        width = 0.0 if family in FROM_FILE else 1.2
        axes.plot(x, y, label=family, linewidth=width, markersize=5, **style)
        for line, at in zip(found, zip(x, y, strict=True), strict=True):
            whole = line.method.replace(".json", "")
            names.append(Name(whole.removeprefix(f"{family}:"), whole, at, style["color"]))
    for line in lines:
        if line.family == "dense":
            axes.axvline(line.executed, color="0.4", linestyle="--", linewidth=1)
            axes.annotate(
                "dense: KL 0", (line.executed, 1), xycoords=("data", "axes fraction"),
                xytext=(-4, -4), textcoords="offset points", ha="right", va="top", fontsize=7,
            )  # fmt: skip
    axes.set(
        xlabel="key tiles executed, of dense attention's",
        ylabel="next-token KL from dense (nats, mean over positions)",
        xlim=(0, None),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(which="major", color="0.92")
    return names
