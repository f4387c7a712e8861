"""The sections of a report on evaluations that score answers, in Markdown."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.common.plotting import short_tokens
from experiments.report.beside import beside_paper, split_kept
from experiments.report.markdown import Block, Drawing, percent, points, table
from experiments.report.pictures import needle_pictures, prefill_picture
from experiments.report.read import Entry
from experiments.report.scores import (
    Scored,
    base_of,
    by_length,
    cells_of,
    costs,
    difference,
    estimate,
    length_table,
    read_scores,
    samples_in_words,
    score_table,
)
from experiments.report.study import studies
from experiments.ruler.report import averages, averages_picture
from experiments.ruler.scores import THRESHOLD, effective_length
from experiments.scbench.report import Groups, turns_picture

# RULER's categories.
_GROUPS = {
    "retrieval": ("niah_",),
    "tracing": ("vt",),
    "aggregation": ("cwe", "fwe"),
    "questions": ("qa_",),
}


def scored(entries: Sequence[Entry], kind: str) -> list[Scored]:
    """Returns the studies of one kind of evaluation."""
    return studies((entry for entry in entries if entry.record["kind"] == kind), read_scores)


def title(study: Scored) -> str:
    """Returns model, lengths and mode in words."""
    lengths = sorted({length for _, length in cells_of(study)})
    ends = dict.fromkeys(short_tokens(length) for length in (lengths[0], lengths[-1]))
    mode = "" if study.mode is None else f", {study.mode.replace('_', ' ')}"
    return f"{study.model}, {' to '.join(ends)} tokens{mode}"


def section(study: Scored, folder: Path, name: str) -> Iterator[Block]:
    """Yields the section of one study.

    Args:
        study: what is shown.
        folder: of the page.
        name: how names of pictures begin.
    """
    yield f"### {title(study)}"
    yield study.caption(folder, samples_in_words(study))
    yield from _BODIES[study.kind](study, name)
    if (found := length_table(study)) is not None:
        yield "Score and costs by length:"
        yield found
    # Of a conversation's later pieces only what is new is read.
    if found is not None and study.kind != "scbench":
        draw = functools.partial(prefill_picture, study)
        yield Drawing(f"{name}-prefill", f"Seconds to read prompts by length, {study.model}", draw)
    yield from _kept(study)
    yield from beside_paper(study)


def _needle(study: Scored, name: str) -> Iterator[Block]:
    yield score_table(study, by_length(study))
    draw = functools.partial(needle_pictures, study)
    yield Drawing(name, f"Needles found by length and depth, each method, {study.model}", draw)


def _ruler(study: Scored, name: str) -> Iterator[Block]:
    longest = {label: effective_length(averages(found)) for label, found in study.methods.items()}
    effective = lambda label: "none" if longest[label] is None else f"{longest[label]:,}"
    yield (
        "Means over tasks by tokens; effective: the longest up to which they are above "
        f"{100 * THRESHOLD:.1f} %."
    )
    yield score_table(study, by_length(study), {"effective": effective})
    draw = lambda path: averages_picture(study.methods, title=study.model, path=path)
    yield Drawing(name, f"Average score by length, {study.model}", draw)
    tasks = list(dict.fromkeys(task for task, _ in cells_of(study)))
    rows = []
    for group, begins in _GROUPS.items():
        columns = by_length(study, [task for task in tasks if task.startswith(begins)])
        for label in study.methods if columns else ():
            cells = [percent(estimate(study, label, each).mean) for each in columns.values()]
            rows.append([group, label, *cells])
    yield "By group of tasks and tokens:"
    yield table(["group", "method", *by_length(study)], rows)
    yield "By task, means over lengths:"
    yield score_table(study, _by_task(study))


def _infinitebench(study: Scored, name: str) -> Iterator[Block]:
    del name
    yield score_table(study, _by_task(study))


def _scbench(study: Scored, name: str) -> Iterator[Block]:
    lengths = sorted({length for _, length in cells_of(study)})
    turns = max(int(task.rpartition(" ")[2]) for task, _ in cells_of(study))
    tasks = list(dict.fromkeys(task.partition(", turn ")[0] for task, _ in cells_of(study)))
    yield (
        "The samples of the intervals are conversations: their turns depend on each other. "
        "`prefill`: of what is read right before an answer, the context with it in the first turn "
        "of `multi turn`."
    )
    for task in tasks:
        cells = [cell for cell in cells_of(study) if cell[0].startswith(f"{task}, turn ")]
        columns = {
            f"turn {turn}": [cell for cell in cells if cell[0].endswith(f" {turn}")]
            for turn in range(1, turns + 1)
        }
        yield f"`{task}`, by turn:"
        yield score_table(study, columns)
    modes: dict[str, dict[Any, Any]] = {
        label: {study.mode: scores} for label, scores in study.methods.items()
    }
    groups = Groups(tasks=tasks, lengths=lengths, turns=turns)
    draw = lambda path: turns_picture(modes, groups, title=title(study), path=path)
    yield Drawing(name, f"Score by turn, {title(study)}", draw)


_BODIES: dict[str, Callable[[Scored, str], Iterator[Block]]] = {
    "needle": _needle,
    "ruler": _ruler,
    "infinitebench": _infinitebench,
    "scbench": _scbench,
}


def _by_task(study: Scored) -> dict[str, list[tuple[str, int]]]:
    columns: dict[str, list[tuple[str, int]]] = {}
    for task, length in cells_of(study):
        columns.setdefault(task, []).append((task, length))
    return columns


def _kept(study: Scored) -> Iterator[str]:
    """The paper's Table 5: attention of the prompt down, what is kept for decoding across."""
    labels = {split_kept(label): label for label in study.methods}
    kinds = list(dict.fromkeys(kept for _, kept in labels))
    if len(kinds) < 2:
        return
    cells, rows = cells_of(study), []
    for attention in dict.fromkeys(attention for attention, _ in labels):
        row = [attention]
        for kept in kinds:
            label = labels.get((attention, kept))
            row.append("" if label is None else _with_cache(study, label, cells))
        rows.append(row)
    yield "By what is kept of the prompt for decoding, average score, and MiB of the cache:"
    yield table(["attention of the prompt", *(kept or "all" for kept in kinds)], rows)


def _with_cache(study: Scored, label: str, cells: list[tuple[str, int]]) -> str:
    score, cost = estimate(study, label, cells).mean, costs(study, label, cells)
    return f"{percent(score)} ({cost.cache_bytes / 2**20:,.4g})"


def headline(study: Scored, label: str) -> str:
    """Returns a method's average, the interval of its difference from dense, and what it costs."""
    if label not in study.methods:
        return ""
    cells, base = cells_of(study), base_of(study)
    score = percent(estimate(study, label, cells).mean)
    if base is not None and label != base:
        found = difference(study, label, cells, base)
        score += f" [{points(found.low)}, {points(found.high)}]"
    longest = max(length for _, length in cells)
    cost = costs(study, label, [cell for cell in cells if cell[1] == longest])
    # Of a conversation's later pieces only what is new is read.
    seconds = "" if study.kind == "scbench" else f", {cost.prefill_seconds:.3g} s"
    return f"{score}<br>{percent(cost.density)} %{seconds}"
