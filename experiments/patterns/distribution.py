"""`minference patterns distribution`: which head has which pattern (Fig. 11)."""

import collections
import dataclasses
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import tyro
from jaxtyping import Int
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

import minference_jax as mj
from experiments.common.attention import read_attention
from experiments.common.errors import UserError
from experiments.common.plotting import new_figure, save
from experiments.patterns.options import Analysis
from experiments.search.report import label

# Patterns with a colour of their own; rarer ones share the last.
_COLOURS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution(Analysis):
    """Which patterns, with which sizes, a pattern file gives to how many heads of each layer."""

    patterns: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")]
    """The name of shipped patterns, or a file (this project's own format, or the original
    project's JSON)."""

    def run(self) -> None:
        """Runs the analysis; raises UserError if the file is no pattern file."""
        attention = read_attention(self.patterns)
        if not isinstance(attention, mj.SparseAttention):
            raise UserError(f"{self.patterns} holds thresholds, which have no kinds to count")
        patterns = attention.patterns
        title = Path(self.patterns).name.removesuffix(".json")  # names of models have dots
        self.check_writable()
        console = Console()
        labels, number = distribution(patterns)
        counts = np.bincount(number.ravel(), minlength=len(labels))
        table = Table(title=f"{title}: {number.shape[0]} layers, {number.size} heads")
        for name in ("pattern", "heads", "share", "layers"):
            table.add_column(name, justify="left" if name == "pattern" else "right")
        layers = [int(np.sum(np.any(number == at, axis=1))) for at in range(len(labels))]
        for name, count, within in zip(labels, counts, layers, strict=True):
            table.add_row(name, str(count), f"{count / number.size:.1%}", str(within))
        console.print(table)
        picture = _picture(labels, number, title, self.output)
        rows = [
            {"pattern": name, "heads": int(count), "by_layer": np.sum(number == at, axis=1)}
            for at, (name, count) in enumerate(zip(labels, counts, strict=True))
        ]
        result = {"file": Path(self.patterns).name, "patterns": rows}
        self.keep(console, "distribution", result, picture)


def distribution(patterns: mj.HeadPatterns) -> tuple[list[str], Int[np.ndarray, "layers heads"]]:
    """The patterns that occur, the most frequent first, and each head's number among them."""
    grid = [[label(pattern) for pattern in layer] for layer in patterns.grid()]
    counts = collections.Counter(name for layer in grid for name in layer)
    labels = [name for name, _ in counts.most_common()]
    return labels, np.array([[labels.index(name) for name in layer] for layer in grid])


def _picture(
    labels: list[str], number: Int[np.ndarray, "layers heads"], title: str, folder: Path
) -> Path:
    shown = np.minimum(number, _COLOURS - 1)
    names = labels if len(labels) <= _COLOURS else [*labels[: _COLOURS - 1], "others"]
    colours = mpl.colormaps["Paired"](np.arange(_COLOURS))[:, :3]
    num_layers, num_heads = number.shape
    height = min(max(1.8 + 0.16 * num_layers, 3.8), 13.0)
    figure, axes = new_figure(min(6.2 + 0.12 * num_heads, 14.0), height, columns=2)
    figure.suptitle(title, fontsize=10)
    axes[0].imshow(colours[shown], aspect="auto", origin="upper")
    axes[0].set(xlabel="head", ylabel="layer", title="pattern of each head")
    before = np.zeros(num_layers, int)
    for at, colour in enumerate(colours[: len(names)]):
        count = np.sum(shown == at, axis=1)
        axes[1].barh(np.arange(num_layers), count, left=before, color=colour, height=0.9)
        before += count
    axes[1].set(xlabel="heads", ylabel="layer", title="heads of each pattern")
    axes[1].set_ylim(num_layers - 0.5, -0.5)
    for one in axes:
        one.yaxis.set_major_locator(MaxNLocator(min(num_layers, 10), integer=True))
        one.xaxis.set_major_locator(MaxNLocator(min(num_heads, 8), integer=True))
    figure.legend(
        handles=[
            Patch(color=colours[at], label=f"{name}: {int(np.sum(shown == at))}")
            for at, name in enumerate(names)
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return save(figure, folder / f"distribution_{title}.png")
