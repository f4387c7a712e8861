"""A comparison as one table and one picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from experiments.common.plotting import new_figure, save
from experiments.compare.methods import Method

# Divergences below this are rounding: a logarithm needs a floor.
_FLOOR = 1e-8
# Columns of text that the table needs.
WIDTH = 100
_MARKERS = "os^vDPX<>*phd"


class Row(NamedTuple):
    """One method on one prompt."""

    prompt: str
    method: Method
    result: dict[str, Any]


def table(rows: Sequence[Row]) -> Table:
    """All rows, prompt after prompt, and the means over prompts if there are several."""
    result = Table(box=None, pad_edge=False)
    result.add_column("method", no_wrap=True)
    for name in ("executed", "visited", "KL", "top-1", "perplexity", "answer", "right", "prefill"):
        result.add_column(name, justify="right", no_wrap=True)
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    sections = {prompt: [row for row in rows if row.prompt == prompt] for prompt in prompts}
    if len(prompts) > 1:
        sections[f"mean of {len(prompts)} prompts"] = means(rows)
    for prompt, section in sections.items():
        result.add_row(f"[bold]{prompt}[/bold]")
        for row in section:
            result.add_row(f"  {row.method.label}", *_cells(row.result))
    return result


def means(rows: Sequence[Row]) -> list[Row]:
    """One row for each method: means over the prompts, of the perplexity the geometric one."""
    by_method: dict[Method, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row.result)
    return [Row("mean", method, _mean(results)) for method, results in by_method.items()]


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [result[name] for result in results if result[name] is not None]
        return float(np.mean(values)) if values else None

    names = ("executed", "visited", "kl", "top1", "answer_probability", "answer_right")
    times = [np.median(r["prefill_seconds"]) for r in results if r["prefill_seconds"]]
    return {
        **{name: mean(name) for name in names},
        "perplexity": float(np.exp(np.mean([np.log(r["perplexity"]) for r in results]))),
        "prefill_seconds": [float(np.mean(times))] if times else [],
    }


def _cells(result: dict[str, Any]) -> list[str]:
    answer, seconds = result["answer_probability"], result["prefill_seconds"]
    return [
        f"{result['executed']:.1%}",
        f"{result['visited']:.1%}",
        f"{result['kl']:.2g}",
        f"{result['top1']:.1%}",
        f"{result['perplexity']:.3f}",
        "" if answer is None else f"{answer:.3f}",
        _right(result["answer_right"]),
        f"{np.median(seconds):.2f} s" if seconds else "",
    ]


def _right(share: bool | float | None) -> str:
    """Whether the answer is right, or of a mean how often."""
    if share is None:
        return ""
    return ("yes" if share else "no") if isinstance(share, bool) else f"{share:.0%}"


def picture(rows: Sequence[Row], *, title: str, path: Path) -> Path:
    """Writes the picture: divergence from dense against what is executed, a line for each family.

    Every point is the mean over the prompts.
    """
    figure, [axes] = new_figure(7.6, 5.2)
    draw_quality(axes, means(rows))
    prompts = len({row.prompt for row in rows})
    axes.set_title(textwrap.fill(title + (f" (mean of {prompts})" if prompts > 1 else ""), 90))
    return save(figure, path)


def draw_quality(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws mean rows; dense attention is the reference that nothing diverges from."""
    axes.set_yscale("log")
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.method.family, []).append(row)
    colours = mpl.colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])
    sparse = {name: found for name, found in families.items() if name != "dense"}
    for number, (family, found) in enumerate(sparse.items()):
        found = sorted(found, key=lambda row: row.result["executed"])
        x = [row.result["executed"] for row in found]
        y = [max(row.result["kl"], _FLOOR) for row in found]
        style = {"color": colours[number % len(colours)], "marker": _MARKERS[number % 13]}
        axes.plot(x, y, label=family, linewidth=1.2, markersize=5, **style)
        for row, at in zip(found, zip(x, y, strict=True), strict=True):
            _, _, budget = row.method.label.partition(":")
            axes.annotate(
                budget, at, xytext=(4, 3), textcoords="offset points", fontsize=6, color="0.35"
            )
    for row in families.get("dense", []):
        axes.axvline(row.result["executed"], color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            "dense: KL 0", (row.result["executed"], 1), xycoords=("data", "axes fraction"),
            xytext=(-4, -4), textcoords="offset points", ha="right", va="top", fontsize=7,
        )  # fmt: skip
    axes.set(
        xlabel="key tiles executed, of dense attention's",
        ylabel="next-token KL from dense (nats, mean over positions)",
        xlim=(0, None),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(which="major", color="0.92")
    if sparse:
        axes.figure.legend(frameon=False, fontsize=7, loc="outside right upper")
