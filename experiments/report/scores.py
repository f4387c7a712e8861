"""Evaluations that score answers: studies of them, means of any tasks and lengths, their costs."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.evaluation.run import Mean, means
from experiments.evaluation.stages import Score
from experiments.report.markdown import percent, points, table
from experiments.report.statistics import Estimate, difference_of, mean_of
from experiments.report.study import Study

Scored = Study[list[Score]]
# A task and a length.
Cell = tuple[str, int]

# Names of samples, as the commands give them.
_NAMES = {
    "needle": re.compile(r"(?P<length>\d+) tokens, (?P<depth>[\d.]+) %, \d+"),
    "ruler": re.compile(r"(?P<task>\w+)-(?P<length>\d+)-\d+"),
    "infinitebench": re.compile(r"(?P<task>\w+)-(?P<length>\d+)-\d+"),
    # Turns of one conversation depend on each other: together they are one sample.
    "scbench": re.compile(r"(?P<task>.+, turn \d+), (?P<length>\d+) tokens, (?P<unit>\d+)"),
}
_TOLERANCE = 1e-9


class Costs(NamedTuple):
    """What reading and answering cost: means over tasks and lengths."""

    density: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: float


COSTS = ("visited, %", "prefill, s", "decoding, s", "cache, MiB")


def read_scores(record: dict[str, Any]) -> list[tuple[str | None, Iterable[Hashable], list[Score]]]:
    """Returns mode, names of samples and scores of a record, of each mode; see `studies`.

    A score's costs are the means of its task and length: a record holds no others.

    Raises:
        ValueError: scores and means of the record disagree, or a name is none of a sample.
    """
    result, kind = record["result"], record["kind"]
    parts = result["modes"] if kind == "scbench" else {None: result}
    return [(mode, part["scores"], _scores(part, kind)) for mode, part in parts.items()]


def _scores(part: dict[str, Any], kind: str) -> list[Score]:
    cells = {(mean["task"], mean["length"]): Mean(**mean) for mean in part["means"]}
    scores = []
    for name, score in part["scores"].items():
        found = parse_name(kind, name)
        mean = cells[found.get("task", kind), int(found["length"])]
        scores.append(
            Score(
                name=name,
                task=mean.task,
                length=mean.length,
                score=score,
                density=mean.density,
                prefill_seconds=mean.prefill_seconds,
                decode_seconds=mean.decode_seconds,
                cache_bytes=round(mean.cache_bytes),
            )
        )
    again = {(mean.task, mean.length): mean for mean in means(scores)}
    for cell, mean in cells.items():
        same = cell in again and again[cell].samples == mean.samples
        if not same or abs(again[cell].score - mean.score) > _TOLERANCE:
            raise ValueError(f"the mean of {cell[0]}, {cell[1]} tokens is not that of its scores")
    return scores


def parse_name(kind: str, name: str) -> dict[str, str]:
    """Returns what the name of a sample says: its length, and where there is one task, depth, unit.

    Raises:
        ValueError: it is no name of such a sample.
    """
    found = _NAMES[kind].fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no name of a sample")
    return found.groupdict()


def cells_of(study: Scored) -> list[Cell]:
    """Returns the tasks and lengths of a study, in order."""
    first = next(iter(study.methods.values()))
    return list(dict.fromkeys((one.task, one.length) for one in first))


def samples_in_words(study: Scored) -> str:
    """Returns how many samples of each task and length there are."""
    numbers = sorted({mean.samples for scores in study.methods.values() for mean in means(scores)})
    what = "length" if study.kind == "needle" else "task and length"
    text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{text} sample{'s' * (numbers != [1])} of each {what}"


def estimate(study: Scored, label: str, cells: Iterable[Cell]) -> Estimate:
    """Returns a method's mean over tasks and lengths, all of which count the same."""
    values, weights = _units(study, label, list(cells))
    return mean_of(values, weights)


def difference(study: Scored, label: str, cells: Iterable[Cell], base: str) -> Estimate:
    """Returns how much larger a method's mean is than that of another on the same samples."""
    cells = list(cells)
    values, weights = _units(study, label, cells)
    others, _ = _units(study, base, cells)
    return difference_of(values, others, weights)


def _units(
    study: Scored, label: str, cells: list[Cell]
) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Scores of independent samples, and their weights in the mean."""
    wanted = set(cells)
    scores = [one for one in study.methods[label] if (one.task, one.length) in wanted]
    sizes = {cell: sum((one.task, one.length) == cell for one in scores) for cell in cells}
    sums: dict[Hashable, list[float]] = {}
    for one in scores:
        weight = 1 / (len(sizes) * sizes[one.task, one.length])
        unit = parse_name(study.kind, one.name).get("unit")
        task = one.task.partition(", turn ")[0]
        key = one.name if unit is None else (task, one.length, unit)
        found = sums.setdefault(key, [0.0, 0.0])
        found[0] += weight * one.score
        found[1] += weight
    # Samples are in the same order for every method only if they are sorted.
    ordered = [sums[key] for key in sorted(sums, key=str)]
    totals, weights = np.array(ordered).T
    return totals / weights, weights


def costs(study: Scored, label: str, cells: Iterable[Cell]) -> Costs:
    """Returns the mean costs of a method over tasks and lengths, all of which count the same."""
    wanted = set(cells)
    found = [mean for mean in means(study.methods[label]) if (mean.task, mean.length) in wanted]
    return Costs(
        *(float(np.mean([getattr(mean, what) for mean in found])) for what in Costs._fields)
    )


def cost_cells(found: Costs) -> list[str]:
    """Returns costs as a table shows them, under `COSTS`."""
    return [
        percent(found.density),
        f"{found.prefill_seconds:.3g}",
        f"{found.decode_seconds:.3g}",
        f"{found.cache_bytes / 2**20:,.4g}",
    ]


def interval(found: Estimate, show: Callable[[float], str]) -> str:
    """Returns a mean and its interval."""
    return f"{show(found.mean)} [{show(found.low)}, {show(found.high)}]"


def base_of(study: Scored) -> str | None:
    """Returns what methods are compared with: dense attention, if it was run."""
    return "dense" if "dense" in study.methods else None


def score_table(
    study: Scored,
    columns: dict[str, list[Cell]],
    more: dict[str, Callable[[str], str]] | None = None,
) -> str:
    """Returns a row for each method: its means of some cells, the mean of all, and the costs.

    Args:
        study: what is shown.
        columns: headings, and the tasks and lengths that each is the mean of.
        more: headings of further columns, and what they say about a method.
    """
    more = more or {}
    every = [cell for cells in columns.values() for cell in cells]
    base = base_of(study)
    shown = columns if len(columns) > 1 else {}

    def row(label: str) -> Iterator[str]:
        yield label
        for cells in shown.values():
            yield percent(estimate(study, label, cells).mean)
        yield interval(estimate(study, label, every), percent)
        if base is not None:
            yield "" if label == base else interval(difference(study, label, every, base), points)
        yield from (say(label) for say in more.values())
        yield from cost_cells(costs(study, label, every))

    headings = ["method", *shown, "average" if shown else next(iter(columns))]
    headings += ["over dense, points"] if base is not None else []
    return table([*headings, *more, *COSTS], [list(row(label)) for label in study.methods])


def length_table(study: Scored) -> str | None:
    """Returns scores and costs of each length and method; None if there is only one length."""
    columns, base = by_length(study), base_of(study)
    if len(columns) < 2:
        return None

    def row(length: str, label: str) -> Iterator[str]:
        cells = columns[length]
        found = costs(study, label, cells)
        yield from (length, label, percent(estimate(study, label, cells).mean), *cost_cells(found))
        if base is not None:
            yield f"{costs(study, base, cells).prefill_seconds / found.prefill_seconds:.2f}"

    rows = [list(row(length, label)) for length in columns for label in study.methods]
    faster = ["prefill, x dense"] if base is not None else []
    return table(["tokens", "method", "score, %", *COSTS, *faster], rows)


def by_length(study: Scored, tasks: Sequence[str] | None = None) -> dict[str, list[Cell]]:
    """Returns columns of `score_table`: a length each, over some tasks, or all."""
    columns: dict[str, list[Cell]] = {}
    for task, length in sorted(cells_of(study), key=lambda cell: cell[1]):
        if tasks is None or task in tasks:
            columns.setdefault(f"{length:,}", []).append((task, length))
    return columns
