"""`minference patterns decoding`: dynamic against static sparsity while tokens are decoded."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from experiments.common.errors import UserError
from experiments.common.measure import stage
from experiments.common.options import at_least
from experiments.common.plotting import new_figure, save
from experiments.patterns.decoding import Decoded, decoding_kept
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.read import AnyArray, layers_of
from models import Model

# Steps that are averaged in tables and pictures.
_GROUPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(PromptAnalysis):
    """Attention of decoding steps inside k keys of the prompt: chosen at each step, or once.

    The last tokens of the text are taken as decoded, and their keys are all kept. The keys chosen
    once are those that the last 64 queries of the prompt weigh most.
    """

    steps: int = 512
    """Tokens at the end of the text that count as decoded."""
    shares: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 4)
    """How many keys of the prompt are kept, as shares of it."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least("steps", self.steps, 1)
        # A prompt is shorter than asked for by less than its last word.
        if self.steps > self.calibration.length // 2:
            raise UserError(
                f"--steps must be at most half of --length {self.calibration.length}, "
                f"got {self.steps}"
            )
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"--shares must be above 0 and at most 1, got {self.shares}")

    def run(self, model: Model | None = None) -> None:
        """Runs the analysis; raises UserError if an input cannot be used.

        Args:
            model: the model if it was loaded before.
        """
        progress, console = Console(stderr=True), Console()
        model, tokens = self.open(model)
        layers, prompt = self.chosen_layers(model), len(tokens[0]) - self.steps
        ks = tuple(max(1, round(share * prompt)) for share in self.shares)
        found = []
        with stage(progress, f"reading {len(tokens[0]):,} tokens") as reading:
            for _, [x] in layers_of(model, tokens, layers):
                found.append(jax.device_get(decoding_kept(x.q, x.k, steps=self.steps, ks=ks)))
        kept = Decoded(*map(np.stack, zip(*found, strict=True)))  # [layers, heads, steps, ks]
        console.print(_table(kept, ks, prompt))
        result = self.about(tokens, layers) | {
            "seconds": reading.seconds,
            "prompt": prompt,
            "ks": ks,
            "steps": _groups(self.steps),
            **{name: _grouped(x) for name, x in kept._asdict().items()},
            "static_by_head": np.round(kept.static.mean(axis=2).astype(float), 4),
            "dynamic_by_head": np.round(kept.dynamic.mean(axis=2).astype(float), 4),
        }
        name, tasks = Path(self.model.model).name, self.calibration.describe()
        title = f"{name}, {tasks}, prompt {prompt:,} tokens"
        picture = save(_picture(kept, ks, title), self.output / "decoding.png")
        self.keep(console, "decoding", result, picture)


def _groups(steps: int) -> np.ndarray:
    """The first step of each group."""
    return np.unique(np.linspace(0, steps, _GROUPS, endpoint=False).astype(int))


def _grouped(values: AnyArray) -> np.ndarray:
    """Means [groups, ks] over heads, layers and the steps of each group."""
    means = values.mean(axis=(0, 1))
    first = _groups(len(means))
    sizes = np.diff([*first, len(means)])
    return np.add.reduceat(means, first, axis=0) / sizes[:, None]


def _table(kept: Decoded, ks: tuple[int, ...], prompt: int) -> Table:
    table = Table(title="% of the attention kept, mean over heads and steps")
    for name in ("keys", "of the prompt", "dynamic", "static", "keys in common"):
        table.add_column(name, justify="right")
    for at, k in enumerate(ks):
        table.add_row(
            str(k), f"{k / prompt:.1%}", *(f"{100 * x[..., at].mean():.1f}" for x in kept)
        )
    return table


def _picture(kept: Decoded, ks: tuple[int, ...], title: str) -> Figure:
    figure, axes = new_figure(9.4, 4.2, columns=2)
    figure.suptitle(title, fontsize=10)
    steps = kept.static.shape[2]
    middle = _groups(steps) + 0.5 * np.diff([*_groups(steps), steps])
    lines = ((kept.dynamic, "o-", "each step"), (kept.static, "s--", "once"))
    for at, k in enumerate(ks):
        colour = f"C{at}"
        for values, marks, words in lines:
            label = f"{k} keys, chosen {words}"
            axes[0].plot(
                middle, _grouped(values)[:, at], marks, color=colour, label=label, markersize=3
            )
        axes[1].plot(middle, _grouped(kept.overlap)[:, at], "^-", color=colour, label=f"{k} keys")
    axes[0].set(title="attention kept, keys after the prompt included")
    axes[1].set(title="keys of a step that were chosen once, too")
    for one in axes:
        one.set(xlabel="decoding step", ylim=(0, 1.02))
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.grid(alpha=0.3)
        one.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("mean over heads")
    return figure
