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
from experiments.search.options import KINDS
from minference_jax.patterns import Kind
from minference_jax.search import LayerScores, Objective

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
        patterns: of every head.
        layers: scores of every layer.
        chosen: number of the candidate of every head.
        objective: what it was chosen by.
        candidates: the candidates, before their budgets were scaled.
        targets: costs that they were scaled to, if they were.
    """

    patterns: mj.HeadPatterns
    layers: list[LayerScores]
    chosen: Int[np.ndarray, "layers heads"]
    objective: Objective
    candidates: list[mj.Pattern]
    targets: list[float] | None

    def of_chosen(self, name: str) -> Float[np.ndarray, "layers heads"]:
        """A score, or a cost, of the chosen candidate of every head."""
        heads = np.arange(self.chosen.shape[1])
        values = [getattr(layer, name) for layer in self.layers]
        return np.stack([x[row, heads] for x, row in zip(values, self.chosen, strict=True)])

    def describe(self) -> str:
        """The means over heads, in words."""
        cost, score = self.of_chosen("flops").mean(), self.of_chosen(self.objective).mean()
        return f"{cost:.1%} of dense attention executed, mean {self.objective} {score:.3g}"

    def labels(self) -> list[str]:
        """The candidates in words."""
        labels = [label(pattern) for pattern in self.candidates]
        if self.targets is None or len(set(self.targets)) == 1:
            return labels
        return [f"{name} at {at:.3g}" for name, at in zip(labels, self.targets, strict=True)]


def table(found: Found) -> Table:
    """All candidates: what they cost and keep, in the mean over heads, and how many heads won."""
    result = Table(box=None, pad_edge=False)
    result.add_column("means over all heads", no_wrap=True)
    for name in ("executed", "visited", "error", "recall", "chosen by"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in _rows(found):
        shares = (f"{row[name]:.1%}" for name in ("flops", "density"))
        scores = (f"{row[name]:.3f}" for name in ("output_error", "recall"))
        result.add_row(row["candidate"], *shares, *scores, str(row["heads"]))
    return result


def summary(found: Found) -> dict[str, Any]:
    """The figures for a record."""
    names = ("flops", "density", *OBJECTIVES)
    return {
        "candidates": _rows(found),
        "chosen": {name: float(found.of_chosen(name).mean()) for name in names},
    }


def search_picture(found: Found, *, title: str, path: Path) -> Path:
    """Writes the picture: the kind of every head, shaded by its loss, and what it visits."""
    layers, heads = found.chosen.shape
    width, height = 4.6 + 0.4 * heads, 2.4 + 0.16 * layers
    figure, axes = new_figure(min(max(width, 8.6), 18.0), min(max(height, 3.8), 10.0), columns=2)
    figure.suptitle(textwrap.fill(title, 72), fontsize=10)
    _draw_kinds(axes[0], found)
    draw_density(axes[1], found.of_chosen("density").astype(np.float32), "visited by each head")
    return save(figure, path)


def _draw_kinds(axes: Axes, found: Found) -> None:
    losses = np.stack([layer.loss(found.objective) for layer in found.layers])
    loss = np.take_along_axis(losses, found.chosen[:, None], axis=1)[:, 0]
    # Most losses are far below the largest: the root tells them apart.
    norm = PowerNorm(0.5, 0.0, max(float(loss.max()), 1e-6))
    weight = 1 - (1 - _FAINTEST) * np.asarray(norm(loss))[..., None]
    kinds = np.asarray(found.patterns.kind)
    colours = np.array([to_rgb(COLOURS[kind]) for kind in sorted(COLOURS)])[kinds]
    axes.imshow(1 - weight * (1 - colours), aspect="auto", origin="upper")
    axes.set(xlabel="head", ylabel="layer", title="pattern, fainter where more is lost")
    for axis, size in ((axes.xaxis, kinds.shape[1]), (axes.yaxis, kinds.shape[0])):
        axis.set_major_locator(MaxNLocator(min(size, 10), integer=True))
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


def _rows(found: Found) -> list[dict[str, Any]]:
    names = ("flops", "density", *OBJECTIVES)
    means = {name: np.mean([getattr(x, name) for x in found.layers], axis=(0, 2)) for name in names}
    return [
        {
            "candidate": label,
            **{name: float(means[name][at]) for name in names},
            "heads": int(np.sum(found.chosen == at)),
        }
        for at, label in enumerate(found.labels())
    ]


def label(pattern: mj.Pattern) -> str:
    """A pattern and its sizes, in short."""
    name = NAMES[type(pattern)]
    sizes = dataclasses.asdict(pattern)
    if isinstance(pattern, mj.VerticalSlash):
        sizes = {"vertical": pattern.vertical_size, "slash": pattern.slash_size}
    return f"{name} {':'.join(map(str, sizes.values()))}".strip()
