"""Scores of each turn as a table and as a picture."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from experiments.common.plotting import line_style, new_figure, save, wrapped
from experiments.evaluation.run import means
from experiments.evaluation.stages import Score
from experiments.scbench.pieces import Mode
from experiments.scbench.samples import turn_task

_STYLES: dict[Mode, str] = {"multi_turn": "-", "shared_context": "--"}
_SPREAD = 0.05  # lines beside each other, because many lie on 0 or 1
_WIDTH = 0.6  # of all of them at most

# Letters of a table without its turns, and of a turn.
_TABLE_WIDTH, _TURN_WIDTH = 56, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """What scores are told apart by."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    turns: int

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Tasks and lengths."""
        return list(itertools.product(self.tasks, self.lengths))

    def of_turns(
        self, scores: Sequence[Score], task: str, length: int, what: str = "score"
    ) -> Float[np.ndarray, " turns"]:
        """Returns the mean of each turn of a task and a length."""
        found = {(mean.task, mean.length): getattr(mean, what) for mean in means(scores)}
        turns = range(1, self.turns + 1)
        return np.array([found[turn_task(task, turn), length] for turn in turns])


def turn_table(scores: Sequence[Score], groups: Groups, *, title: str) -> Table:
    """Returns mean scores of a method and mode in percent: tasks, lengths down, turns across.

    The last columns are the share of causal pairs that were visited, and the cache's memory, up to
    the last question.
    """
    table = Table(title=title)
    table.add_column("score, %", no_wrap=True)
    turns = [f"turn {turn}" for turn in range(1, groups.turns + 1)]
    for name in ("tokens", *turns, "mean", "visited", "cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, length in groups.pairs:
        score = groups.of_turns(scores, task, length)
        density, cache = (
            groups.of_turns(scores, task, length, what)[-1] for what in ("density", "cache_bytes")
        )
        shown = (f"{100 * value:.1f}" for value in (*score, score.mean()))
        costs = f"{100 * density:.1f}%", f"{cache / 2**20:,.4g} MiB"
        table.add_row(task, f"{length:,}", *shown, *costs)
    return table


def make_room(console: Console, groups: Groups) -> None:
    """Makes lines long enough for such a table: a figure cut short would be lost."""
    console.width = max(console.width, _TABLE_WIDTH + _TURN_WIDTH * groups.turns)


def turns_picture(
    scores: Mapping[str, Mapping[Mode, Sequence[Score]]], groups: Groups, *, title: str, path: Path
) -> Path:
    """Writes the picture of scores by turn: a part for each task and length, lines for methods."""
    columns = len(groups.lengths)
    rows = len(groups.tasks)
    lines = [(label, mode) for label, modes in scores.items() for mode in modes]
    apart = min(_SPREAD, _WIDTH / len(lines))
    height = 0.7 + 2.2 * rows + 0.17 * len(lines)
    figure, axes = new_figure(1.6 + 3.4 * columns, height, columns, rows)
    for part, (task, length) in zip(axes, groups.pairs, strict=True):
        for number, (label, mode) in enumerate(lines):
            found = groups.of_turns(scores[label][mode], task, length)
            place = np.arange(1, groups.turns + 1) + apart * (number - (len(lines) - 1) / 2)
            part.plot(
                place, found, _STYLES[mode], **line_style(list(scores).index(label)),
                clip_on=False, label=wrapped(f"{label}, {mode}", figure),
            )  # fmt: skip
        part.set(ylim=(0, 1), xlabel="turn", ylabel="right answers")
        part.xaxis.set_major_locator(MaxNLocator(integer=True))
        part.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        part.set_title(f"{task}, {length:,} tokens", fontsize=8)
    figure.suptitle(wrapped(title, figure), fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=7, frameon=False)
    return save(figure, path)
