"""`minference patterns recall`: attention kept against work (Fig. 3c)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from experiments.common.measure import stage
from experiments.common.options import at_least
from experiments.common.plotting import new_figure, save
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.read import layers_of, spread_rows
from experiments.patterns.recall import (
    FAMILIES,
    Tradeoff,
    ladder,
    top_k_density,
    top_k_recall,
    tradeoff,
)
from experiments.search.report import COLOURS, NAMES
from minference_jax.patterns import Kind
from models import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(PromptAnalysis):
    """Attention inside what each pattern visits against what it costs, at growing budgets.

    Sizes keep the proportions of the paper's candidates. Top-K takes the heaviest keys of each
    query, which needs dense attention to know them: the best there is for the pairs visited.
    """

    steps: int = 8
    """Budgets of each pattern."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least("steps", self.steps, 2)

    def run(self, model: Model | None = None) -> None:
        """Runs the analysis; raises UserError if an input cannot be used.

        Args:
            model: the model if it was loaded before.
        """
        progress, console = Console(stderr=True), Console()
        model, tokens = self.open(model)
        layers, length = self.chosen_layers(model), len(tokens[0])
        rows = jnp.asarray(spread_rows(length, self.rows))
        ks = tuple(np.unique(np.geomspace(1, length, 4 * self.steps).round().astype(int)).tolist())
        heads = model.config.num_heads
        candidates = ladder(FAMILIES, heads, length, self.steps)
        found: list[Tradeoff] = []
        best = []
        with stage(progress, f"reading {length:,} tokens") as reading:
            for _, [prompt] in layers_of(model, tokens, layers):
                found.append(jax.device_get(tradeoff(candidates, prompt.q, prompt.k, rows)))
                best.append(np.asarray(top_k_recall(prompt.q, prompt.k, rows, ks=ks)))
        # [candidates, layers, heads]
        stacked = Tradeoff(*(np.stack(x, axis=1) for x in zip(*found, strict=True)))
        curves: dict[str, Tradeoff] = {
            NAMES[type(family)]: Tradeoff(*(np.split(x, len(FAMILIES))[at] for x in stacked))
            for at, family in enumerate(FAMILIES)
        }
        density = top_k_density(ks, length)
        top_k = Tradeoff(
            *np.broadcast_arrays(np.stack(best, axis=1), *(density[:, None, None],) * 2)
        )
        console.print(_table(curves, top_k))
        result = self.about(tokens, layers) | {
            "seconds": reading.seconds,
            "rows": len(rows),
            **{name: _figures(x) for name, x in {**curves, "top_k": top_k}.items()},
        }
        title = f"{Path(self.model.model).name}, {self.calibration.describe()}, {length:,} tokens"
        picture = save(_picture(curves, top_k, title), self.output / "recall.png")
        self.keep(console, "recall", result, picture)


def at_density(curve: Tradeoff, wanted: np.ndarray, *, by: str = "executed") -> np.ndarray:
    """Recall [wanted, layers, heads] of every head at some densities, interpolated on its curve.

    NaN below what its smallest budget costs; the recall of the largest beyond that.
    """
    cost, recall = (np.moveaxis(np.asarray(x), 0, -1) for x in (getattr(curve, by), curve.recall))
    result = np.empty((*cost.shape[:-1], len(wanted)))
    for head in np.ndindex(*cost.shape[:-1]):
        result[head] = np.interp(wanted, cost[head], recall[head], left=np.nan)
    return np.moveaxis(result, -1, 0)


def _figures(curve: Tradeoff) -> dict[str, Any]:
    means = {name: x.mean(axis=(1, 2)) for name, x in curve._asdict().items()}
    return means | {"recall_by_head": np.round(curve.recall.astype(float), 4)}


_WANTED = (0.05, 0.1, 0.2, 0.3, 0.5)


def _table(curves: dict[str, Tradeoff], top_k: Tradeoff) -> Table:
    table = Table(title="% of the attention kept, mean over heads that reach down to the cost")
    table.add_column("executed")
    for share in _WANTED:
        table.add_column(f"{share:.0%}", justify="right")
    for name, curve in {**curves, "top-k (ideal)": top_k}.items():
        values = at_density(curve, np.array(_WANTED)).reshape(len(_WANTED), -1)
        reached = [row[~np.isnan(row)] for row in values]
        table.add_row(name, *(f"{100 * row.mean():.1f}" if row.size else "-" for row in reached))
    return table


def _picture(curves: dict[str, Tradeoff], top_k: Tradeoff, title: str) -> Figure:
    figure, axes = new_figure(9.4, 4.2, columns=2)
    figure.suptitle(title, fontsize=10)
    kinds = (Kind.A_SHAPE, Kind.VERTICAL_SLASH, Kind.BLOCK_SPARSE)
    colours = dict(zip(curves, (COLOURS[kind] for kind in kinds), strict=True))
    panels = {"executed": "tiles that the kernel executes", "visited": "pairs of query and key"}
    for one, (by, words) in zip(axes, panels.items(), strict=True):
        for name, curve in {**curves, "top-k": top_k}.items():
            cost = getattr(curve, by).mean(axis=(1, 2))
            heads = curve.recall.reshape(len(cost), -1)
            colour = colours.get(name, "0.2")
            one.plot(1 / cost, heads.mean(axis=1), ".-", color=colour, label=name)
            low, high = np.percentile(heads, (10, 90), axis=1)
            one.fill_between(1 / cost, low, high, color=colour, alpha=0.12, linewidth=0)
        one.set(xscale="log", xlim=(0.95, 40), ylim=(0, 1.02))
        one.set(xlabel=f"dense / sparse, {words}", title=f"against {words}")
        one.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 40]))
        one.xaxis.set_minor_locator(NullLocator())
        one.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.grid(alpha=0.3)
    axes[0].set_ylabel("attention kept (mean; 10th to 90th % of heads)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure
