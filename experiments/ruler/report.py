"""Scores of RULER as a table, in words, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from experiments.common.plotting import line_style, new_figure, save, wrapped
from experiments.evaluation.run import COSTS, means
from experiments.evaluation.stages import Score
from experiments.ruler.scores import THRESHOLD, effective_length


def averages(scores: Sequence[Score]) -> dict[int, float]:
    """Returns the mean over tasks, from 0 to 1, of each length."""
    found = means(scores)
    lengths = sorted({mean.length for mean in found})
    return {
        length: float(np.mean([mean.score for mean in found if mean.length == length]))
        for length in lengths
    }


def grid_table(scores: Sequence[Score], *, title: str) -> Table:
    """Returns mean scores in percent: tasks down, lengths across, averages and costs below."""
    found = means(scores)
    cells = {(mean.task, mean.length): mean for mean in found}
    average = averages(scores)
    table = Table("score, %", title=title)
    for length in average:
        table.add_column(f"{length:,} tokens", justify="right")
    for task in dict.fromkeys(mean.task for mean in found):
        table.add_row(task, *(f"{100 * cells[task, length].score:.1f}" for length in average))
    table.add_section()
    table.add_row("average", *(f"{100 * value:.1f}" for value in average.values()))
    of_lengths = [[one for one in scores if one.length == length] for length in average]
    for name, cell in COSTS.items():
        table.add_row(name, *map(cell, of_lengths))
    samples = sorted({mean.samples for mean in found})
    table.caption = f"samples of each task and length: {', '.join(map(str, samples))}"
    return table


def in_words(scores: Sequence[Score]) -> str:
    """Returns the effective length in words."""
    longest = effective_length(averages(scores))
    threshold = f"the average is above {100 * THRESHOLD:.1f} %, Llama2-7B's at 4K"
    if longest is None:
        return f"effective length: none, at no length {threshold}"
    return f"effective length: {longest:,} tokens, up to which {threshold}"


def averages_picture(scores: Mapping[str, Sequence[Score]], *, title: str, path: Path) -> Path:
    """Writes the picture of average scores by length, a line for each method."""
    figure, [axes] = new_figure(5.6, 3.2 + 0.17 * len(scores))
    for number, (label, found) in enumerate(scores.items()):
        average = averages(found)
        axes.plot(
            list(average), list(average.values()), **line_style(number),
            clip_on=False, label=wrapped(label, figure),
        )  # fmt: skip
    axes.axhline(THRESHOLD, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.annotate(
        "effective", (1.02, THRESHOLD), xycoords=("axes fraction", "data"), va="center",
        fontsize=7, color="0.4",
    )  # fmt: skip
    lengths = sorted({one.length for found in scores.values() for one in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(ylim=(0, 1), xlabel="context length (tokens)", ylabel="average score")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_title(wrapped(title, figure), fontsize=8)
    figure.legend(loc="outside lower center", ncols=1, fontsize=7, frameon=False)
    return save(figure, path)
