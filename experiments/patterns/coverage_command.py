"""`minference patterns coverage`: attention inside the heaviest keys (Fig. 2b, 2c)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table

from experiments.common.errors import UserError
from experiments.common.measure import stage
from experiments.common.plotting import new_figure, save
from experiments.patterns.coverage import Kept, column_mass, columns_kept, rows_kept
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.read import AnyArray, layers_of, spread_rows
from experiments.search.options import CalibrationOptions
from models import Model

_SETS = {"columns": "one set of columns for a head", "rows": "a set of keys for each query"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage(PromptAnalysis):
    """Attention inside the k heaviest keys of each head: chosen on the prompt, and on another one.

    Two prompts are read. Keys are chosen once for all queries of a head (columns), or for each
    query; then those of the second prompt are tried on the first, at the same positions. The paper
    takes 4096 of 128K: 1/32 of the prompt.
    """

    calibration: CalibrationOptions = dataclasses.field(
        default=CalibrationOptions(tasks=("book",), prompts=2)
    )
    shares: tuple[float, ...] = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
    """How many keys are kept, as shares of the prompt."""
    map_share: float = 1 / 32
    """The one of them that is drawn for every head."""

    def __post_init__(self) -> None:
        """Raises UserError for shares out of range."""
        super().__post_init__()
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"--shares must be above 0 and at most 1, got {self.shares}")
        if self.map_share not in self.shares:
            raise UserError(f"--map-share {self.map_share} must be one of --shares {self.shares}")

    def run(self, model: Model | None = None) -> None:
        """Runs the analysis; raises UserError if an input cannot be used.

        Args:
            model: the model if it was loaded before.
        """
        progress, console = Console(stderr=True), Console()
        model, tokens = self.open(model, prompts=2)
        layers, length = self.chosen_layers(model), min(map(len, tokens))
        ks = tuple(max(1, round(share * length)) for share in self.shares)
        rows = jnp.asarray(spread_rows(length, self.rows))
        found: dict[str, list[Kept]] = {name: [] for name in _SETS}
        with stage(progress, f"reading 2 prompts of {length:,} tokens") as reading:
            for _, prompts in layers_of(model, tokens, layers):
                first, second = ((x.q, x.k) for x in prompts)
                columns = columns_kept(column_mass(*first), column_mass(*second), ks=ks)
                found["columns"].append(jax.device_get(columns))
                found["rows"].append(jax.device_get(rows_kept(first, second, rows, ks=ks)))
        kept = {name: Kept(*map(np.stack, zip(*x, strict=True))) for name, x in found.items()}
        console.print(_table(kept, ks, length))
        result = self.about(tokens, layers) | {
            "seconds": reading.seconds,
            "rows": len(rows),
            "ks": ks,
            **{name: _figures(x) for name, x in kept.items()},
        }
        title = f"{Path(self.model.model).name}, {self.calibration.describe()}, {length:,} tokens"
        at = self.shares.index(self.map_share)
        pictures = [
            save(_curves(kept, ks, length, title), self.output / "coverage.png"),
            *(
                save(
                    _maps(kept[name], at, list(layers), f"{title}: {ks[at]} keys, {words}"),
                    self.output / f"coverage_{name}.png",
                )
                for name, words in _SETS.items()
            ),
        ]
        self.keep(console, "coverage", result, *pictures)


def _figures(kept: Kept) -> dict[str, Any]:
    means = {name: x.mean(axis=(0, 1)) for name, x in kept._asdict().items()}
    heads = {f"{name}_by_head": np.round(x.astype(float), 4) for name, x in kept._asdict().items()}
    return means | heads


def _table(kept: dict[str, Kept], ks: tuple[int, ...], length: int) -> Table:
    table = Table(title="% of the attention inside k keys, mean over heads")
    for name in ("keys", "of all"):
        table.add_column(name, justify="right")
    for name in kept:
        for column in (name, "other prompt's", "in common"):
            table.add_column(column, justify="right")
    for at, k in enumerate(ks):
        cells = [f"{100 * x[..., at].mean():.1f}" for one in kept.values() for x in one]
        table.add_row(str(k), f"{k / length:.1%}", *cells)
    return table


def _curves(kept: dict[str, Kept], ks: tuple[int, ...], length: int, title: str) -> Figure:
    figure, axes = new_figure(9.0, 4.0, columns=2)
    figure.suptitle(title, fontsize=10)
    labels = ("chosen on this prompt", "chosen on the other prompt", "keys in common")
    lines = (("tab:blue", "o-"), ("tab:red", "s-"), ("0.5", "^--"))
    for one, (name, words) in zip(axes, _SETS.items(), strict=True):
        for x, label, (colour, marks) in zip(kept[name], labels, lines, strict=True):
            heads = x.reshape(-1, len(ks))
            one.plot(ks, heads.mean(axis=0), marks, color=colour, label=label, markersize=4)
            if label != labels[2]:
                low, high = np.percentile(heads, (10, 90), axis=0)
                one.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        one.plot([], [], color="0.6", linewidth=6, alpha=0.4, label="10th to 90th % of the heads")
        one.set(xscale="log", xlabel=f"keys kept, of {length:,}", ylim=(0, 1.02), title=words)
        one.set_xticks(ks)
        one.xaxis.set_major_formatter(ScalarFormatter())
        one.minorticks_off()
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.grid(alpha=0.3)
    axes[0].set_ylabel("attention inside (or keys in common)")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _maps(kept: Kept, at: int, layers: list[int], title: str) -> Figure:
    num_heads = kept.own.shape[1]
    width = min(max(3 * (1.6 + 0.12 * num_heads), 9.0), 16.0)
    figure, axes = new_figure(width, min(max(1.8 + 0.14 * len(layers), 3.4), 9.0), columns=3)
    figure.suptitle(title, fontsize=10)
    titles = ("chosen on this prompt", "chosen on the other", "keys in common")
    for one, x, words in zip(axes, kept, titles, strict=True):
        _draw(one, x[..., at], layers, f"{words}\nmean {x[..., at].mean():.1%}")
    return figure


def _draw(axes: Axes, values: AnyArray, layers: list[int], title: str) -> None:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(min(values.shape[1], 10), integer=True))
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 10)).round().astype(int))
    axes.set_yticks(shown, [str(layers[row]) for row in shown])
    axes.figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1))
