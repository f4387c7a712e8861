"""Pictures of studies: needles by method, scores and prefill times by length."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.common.plotting import (
    line_style,
    log_seconds,
    new_figure,
    save,
    short_tokens,
    wrapped,
)
from experiments.evaluation.stages import Score
from experiments.needle.plot import grids_picture
from experiments.report.scores import Scored, base_of, by_length, costs, parse_name

_GAP = 0.05  # between labels, of the axes' height


def needle_pictures(study: Scored, path: Path) -> None:
    """Writes the heat maps of all methods side by side."""
    first = next(iter(study.methods.values()))
    depths = sorted({_depth(one) for one in first})
    lengths = sorted({one.length for one in first})
    grids = {}
    for label, scores in study.methods.items():
        grid = np.full((len(depths), len(lengths)), np.nan)
        for at in np.ndindex(grid.shape):
            depth, length = depths[at[0]], lengths[at[1]]
            found = [s.score for s in scores if (_depth(s), s.length) == (depth, length)]
            grid[at] = np.mean(found) if found else np.nan
        grids[f"{label}: {np.mean([one.score for one in scores]):.1%}"] = grid
    grids_picture(grids, depths=depths, lengths=lengths, title=study.model, path=path)


def _depth(score: Score) -> float:
    return float(parse_name("needle", score.name)["depth"])


def prefill_picture(study: Scored, path: Path) -> Path:
    """Writes seconds to read a prompt by its length, and at the longest how much faster than dense.

    The paper's Fig. 1b.
    """
    columns = by_length(study)
    lengths = [cells[0][1] for cells in columns.values()]
    seconds = {
        label: np.array([costs(study, label, cells).prefill_seconds for cells in columns.values()])
        for label in study.methods
    }
    figure, [axes] = new_figure(6.6, 4.0)
    base = base_of(study)
    ends: dict[str, tuple[float, str, str]] = {}
    for number, (label, values) in enumerate(seconds.items()):
        dashed = label == base
        [line] = axes.plot(lengths, values, **line_style(number))
        if dashed:
            line.set(color="0.35", linestyle="--")
        faster = f", {seconds[base][-1] / values[-1]:.2f} x" if base and not dashed else ""
        ends[label] = (values[-1], f"{label}{faster}", str(line.get_color()))
    axes.set(xscale="log", xlabel="prompt (tokens)", ylabel="seconds to read it")
    named = [lengths[0]]
    for length in lengths[1:]:
        # Names of closer ones would lie over each other.
        named += [length] if length >= 1.6 * named[-1] else []
    axes.set_xticks(named, [short_tokens(length) for length in named])
    log_seconds(axes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_title(wrapped(f"{study.model}, {study.device}", figure), fontsize=8)
    low, high = np.log(axes.get_ylim())
    heights = {label: (np.log(end[0]) - low) / (high - low) for label, end in ends.items()}
    for label, height in spread(heights).items():
        _, text, colour = ends[label]
        axes.annotate(
            text, (1.02, height), xycoords="axes fraction", fontsize=7, va="center", color=colour
        )
    return save(figure, path)


def spread(heights: Mapping[str, float], gap: float = _GAP) -> dict[str, float]:
    """Returns heights of labels, from 0 to 1, moved apart in their order.

    All of them stay between 0 and 1 if there is room.
    """
    order = sorted(heights, key=lambda label: heights[label])
    steps = gap * np.arange(len(order))
    # Labels are `gap` apart if these do not fall.
    free = _not_falling(np.array([heights[label] for label in order]) - steps)
    free = np.maximum(np.minimum(free, 1 - steps[-1]), 0)
    return dict(zip(order, (free + steps).tolist(), strict=True))


def _not_falling(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The nearest sequence that does not fall: means over runs that would."""
    runs: list[list[float]] = []
    for value in values.tolist():
        runs.append([value])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    return np.concatenate([np.full(len(run), np.mean(run)) for run in runs])
