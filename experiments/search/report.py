"""What a search found: a table of candidates, figures for the record, and a picture."""

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.table import Table

import minference_jax as mj
from experiments.common.plotting import draw_density, new_figure, save
from experiments.search.space import KINDS
from minference_jax.patterns import Kind
from minference_jax.search import Candidates, LayerScores, Objective

NAMES = {made: name for name, made in KINDS.items()}

COLOURS = {
    Kind.A_SHAPE: "tab:blue",
    Kind.TRI_SHAPE: "tab:purple",
    Kind.VERTICAL_SLASH: "tab:red",
    Kind.BLOCK_SPARSE: "tab:green",
    Kind.DENSE: "0.3",
}
# The weight of a kind's colour, on white, for the largest loss.
_FAINTEST = 0.25

_LOSSES: dict[Objective, str] = {
    "residual_error": "squared error added / squared residual stream",
    "output_error": "squared error / squared output",
    "recall": "attention mass lost (1 - recall)",
    "log_recall": "mean -log of the attention mass kept",
    "count": "outputs off by more than 0.005",
}
OBJECTIVES = tuple(_LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The scores of all layers, and what was chosen by them.

    Attributes:
        attention: patterns, or thresholds, of every head.
        layers: scores of every layer, of the candidates that it was chosen from.
        chosen: number of the candidate of every head.
        objective: what it was chosen by.
        labels: the candidates in words.
    """

    attention: Candidates
    layers: list[LayerScores]
    chosen: Int[np.ndarray, "layers heads"]
    objective: Objective
    labels: list[str]

    def of_chosen(self, name: str) -> Float[np.ndarray, "layers heads"]:
        """A score, or a cost, of the chosen candidate of every head."""
        heads = np.arange(self.chosen.shape[1])
        values = [getattr(layer, name) for layer in self.layers]
        return np.stack([x[row, heads] for x, row in zip(values, self.chosen, strict=True)])

    def describe(self) -> str:
        """The means over heads, in words."""
        cost, score = self.of_chosen("flops").mean(), self.of_chosen(self.objective).mean()
        return f"{cost:.1%} of dense attention executed, mean {self.objective} {score:.3g}"


def table(found: Found) -> Table:
    """All candidates: cost and scores in the mean over heads, and how many heads chose them.

    "error" is relative to the head's output, "stream" to the residual stream.
    """
    result = Table(box=None, pad_edge=False)
    result.add_column("means over all heads", no_wrap=True)
    for name in ("executed", "error", "stream", "recall", "heads"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in _rows(found):
        scores = (
            f"{row['output_error']:.3f}",
            f"{row['residual_error']:.1e}",
            f"{row['recall']:.3f}",
        )
        result.add_row(row["candidate"], f"{row['flops']:.1%}", *scores, str(row["heads"]))
    return result


def summary(found: Found) -> dict[str, Any]:
    """The figures for a record."""
    return {"candidates": _rows(found), "chosen": means(found)}


def means(found: Found) -> dict[str, float]:
    """Costs and scores of what was chosen, in the mean over heads."""
    return {name: float(found.of_chosen(name).mean()) for name in _figures(found)}


def _figures(found: Found) -> tuple[str, ...]:
    density = () if found.layers[0].density is None else ("density",)
    return ("flops", *density, *OBJECTIVES)


def search_picture(found: Found, *, title: str, path: Path) -> Path:
    """Writes the picture: what every head got, and what it executes.

    Kinds are shaded by their loss; thresholds are named.
    """
    layers, heads = found.chosen.shape
    width, height = 4.6 + 0.4 * heads, 2.4 + 0.16 * layers
    figure, axes = new_figure(min(max(width, 8.6), 18.0), min(max(height, 3.8), 10.0), columns=2)
    figure.suptitle(textwrap.fill(title, 72), fontsize=10)
    if isinstance(found.attention, mj.HeadPatterns):
        _draw_kinds(axes[0], found, found.attention)
    else:
        _draw_candidates(axes[0], found)
    executed = found.of_chosen("flops").astype(np.float32)
    draw_density(axes[1], executed, "executed by each head", "key tiles, of dense attention's")
    return save(figure, path)


def _draw_kinds(axes: Axes, found: Found, patterns: mj.HeadPatterns) -> None:
    losses = np.stack([layer.loss(found.objective) for layer in found.layers])
    loss = np.take_along_axis(losses, found.chosen[:, None], axis=1)[:, 0]
    # Most losses are far below the largest: the root tells them apart.
    norm = PowerNorm(0.5, 0.0, max(float(loss.max()), 1e-6))
    weight = 1 - (1 - _FAINTEST) * np.asarray(norm(loss))[..., None]
    kinds = np.asarray(patterns.kind)
    colours = np.array([to_rgb(COLOURS[kind]) for kind in sorted(COLOURS)])[kinds]
    axes.imshow(1 - weight * (1 - colours), aspect="auto", origin="upper")
    axes.set(xlabel="head", ylabel="layer", title="pattern, fainter where more is lost")
    _mark_heads(axes, kinds.shape)
    counts = {kind: int(np.sum(kinds == kind)) for kind in COLOURS}
    axes.figure.legend(
        handles=[
            Patch(color=COLOURS[kind], label=f"{kind.name.lower()}: {count} heads")
            for kind, count in counts.items()
            if count
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    shades = LinearSegmentedColormap.from_list("loss", ["0", str(1 - _FAINTEST)])
    bar = axes.figure.colorbar(ScalarMappable(norm, shades), ax=axes)
    bar.set_label(_LOSSES[found.objective])


def _draw_candidates(axes: Axes, found: Found) -> None:
    drawn = axes.imshow(
        found.chosen, aspect="auto", origin="upper", vmin=0, vmax=len(found.labels) - 1
    )
    axes.set(xlabel="head", ylabel="layer", title="threshold of each head")
    _mark_heads(axes, found.chosen.shape)
    bar = axes.figure.colorbar(drawn, ax=axes, ticks=range(len(found.labels)))
    bar.ax.set_yticklabels(found.labels)


def _mark_heads(axes: Axes, shape: tuple[int, ...]) -> None:
    for axis, size in ((axes.xaxis, shape[1]), (axes.yaxis, shape[0])):
        axis.set_major_locator(MaxNLocator(min(size, 10), integer=True))


def _rows(found: Found) -> list[dict[str, Any]]:
    names = _figures(found)
    values = {
        name: np.mean([getattr(x, name) for x in found.layers], axis=(0, 2)) for name in names
    }
    return [
        {
            "candidate": label,
            **{name: float(values[name][at]) for name in names},
            "heads": int(np.sum(found.chosen == at)),
        }
        for at, label in enumerate(found.labels)
    ]


def label(pattern: mj.Pattern) -> str:
    """A pattern and its sizes, in short."""
    name = NAMES[type(pattern)]
    sizes = dataclasses.asdict(pattern)
    if isinstance(pattern, mj.VerticalSlash):
        sizes = {"vertical": pattern.vertical_size, "slash": pattern.slash_size}
    return f"{name} {':'.join(map(str, sizes.values()))}".strip()
