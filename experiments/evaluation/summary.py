"""Means of scores, as records and people see them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from experiments.evaluation.stages import Score


class Mean(NamedTuple):
    """Mean over the samples of a task and a length.

    Attributes:
        task: the task.
        length: tokens that the prompts were made for.
        samples: how many there are.
        score: how right answers are, 0 to 1.
        density: share of the causal pairs visited.
        prefill_seconds: to the first token of a prompt, compilation apart.
        decode_seconds: from there to the end of an answer, compilation apart.
        cache_bytes: of the keys and values of a prompt and its answer.
    """

    task: str
    length: int
    samples: int
    score: float
    density: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: float


_AVERAGED = Mean._fields[3:]

# Costs as they are shown.
_COSTS: dict[str, Callable[[list[Score]], str]] = {
    "pairs visited, %": lambda group: f"{100 * _average(group, 'density'):.1f}",
    "prefill, s": lambda group: f"{_average(group, 'prefill_seconds'):.3g}",
    "decoding, s": lambda group: f"{_average(group, 'decode_seconds'):.3g}",
    "cache, MiB": lambda group: f"{_average(group, 'cache_bytes') / 2**20:,.4g}",
}


def means(scores: Sequence[Score]) -> list[Mean]:
    """Returns the means of each task and length, in the order in which they come first."""
    groups: dict[tuple[str, int], list[Score]] = {}
    for one in scores:
        groups.setdefault((one.task, one.length), []).append(one)
    return [
        Mean(*at, len(group), *(_average(group, name) for name in _AVERAGED))
        for at, group in groups.items()
    ]


def table(scores: dict[str, list[Score]], *, title: str) -> Table:
    """Returns a column for each method: its scores, then what each length costs per prompt."""
    found = Table("score, %", title=title)
    for name in ("tokens", "samples", *scores):
        found.add_column(name, justify="right")
    of_methods = [means(of_method) for of_method in scores.values()]
    for row in zip(*of_methods, strict=True):
        cells = (f"{100 * mean.score:.1f}" for mean in row)
        found.add_row(row[0].task, f"{row[0].length:,}", str(row[0].samples), *cells)
    lengths = dict.fromkeys(mean.length for mean in of_methods[0])
    for name, cell in _COSTS.items():
        found.add_section()
        for length in lengths:
            groups = [[one for one in each if one.length == length] for each in scores.values()]
            found.add_row(name, f"{length:,}", str(len(groups[0])), *map(cell, groups))
    return found


def _average(scores: Sequence[Score], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in scores]))
