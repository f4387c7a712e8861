"""Rows of a record over all prompts: one line for each method, as a table and as Markdown."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments.compare.prompts import FILE
from experiments.compare.rows import Point, Row

# Tasks whose perplexity means something: running text without a question.
_TEXTS = ("book", "code")
# What the columns of the tables mean.
LEGEND = (
    "Means over prompts. `executed`: key tiles that the kernel runs; `visited`: pairs of query "
    "and key; both of dense attention's. `KL`: of the next token from dense attention, nats. "
    "`top-1`: the same likeliest token. `perplexity`: change against dense attention on books "
    "and code. `prefill`: median time to read a prompt. Under a task: right answers."
)
_HEADINGS = ("executed", "visited", "KL", "top-1", "perplexity", "prefill")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """What the prompts of one table have in common.

    Attributes:
        model: name of the model's file or folder.
        model_sha256: of its configuration and part of its weights.
        length: tokens of the prompts; None for prompts from files.
        prompts: their names.
    """

    model: str
    model_sha256: str
    length: int | None
    prompts: tuple[str, ...]

    def holds(self, point: Point) -> bool:
        """Whether a row belongs to the group."""
        return (self.model, self.model_sha256, self.length) == _key(point)

    @property
    def title(self) -> str:
        """The group in words."""
        long = "files" if self.length is None else f"{self.length:,} tokens"
        return f"{self.model}, {long}, {len(self.prompts)} prompt{'s' * (len(self.prompts) > 1)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One method over all prompts of a group.

    Attributes:
        method: its label.
        prompts: how many it was measured on.
        executed: key tiles, as a share of dense attention's.
        visited: pairs of query and key, as a share of dense attention's.
        kl: mean of KL(dense || method) over prompts, each a mean over positions; nats.
        top1: share of positions whose likeliest next token is dense attention's.
        perplexity_change: of books and code against dense attention, geometric mean less one;
            None without such prompts.
        answers: for each task that asks, how many answers were right, and how many were asked for.
        prefill_seconds: median over prompts of their medians.
    """

    method: str
    prompts: int
    executed: float
    visited: float
    kl: float
    top1: float
    perplexity_change: float | None
    answers: dict[str, tuple[int, int]]
    prefill_seconds: float

    @property
    def family(self) -> str:
        """The method without its budget."""
        return self.method.partition(":")[0]


def summarise(rows: Iterable[Row]) -> dict[Group, list[Line]]:
    """Returns the lines of each group of rows, one group for each model and length.

    Of rows that measure the same the last one counts; and in a group only those that were made
    under the same conditions as the last.
    """
    by_key: dict[tuple[str, str, int | None], dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        point = row.point
        own = (point.method, point.patterns_sha256, point.prompt_sha256)
        found = by_key.setdefault(_key(point), {})
        found.pop(own, None)
        found[own] = row
    result = {}
    for (model, sha256, length), latest in by_key.items():
        made = [*latest.values()][-1].made
        same = [row for row in latest.values() if row.made == made]
        prompts = {row.point.prompt_sha256: row.point.prompt for row in same}
        names = tuple(sorted(prompts.values()))
        group = Group(model=model, model_sha256=sha256, length=length, prompts=names)
        result[group] = _lines(same)
    return result


def _key(point: Point) -> tuple[str, str, int | None]:
    return point.model, point.model_sha256, None if point.task == FILE else point.length


def _lines(rows: Sequence[Row]) -> list[Line]:
    """One line for each method, dense first, the others by family and by what they execute."""
    methods: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        methods.setdefault((row.point.method, row.point.patterns_sha256), []).append(row)
    dense = {
        row.point.prompt_sha256: row.result["perplexity"]
        for row in rows
        if row.point.method == "dense"
    }
    lines = [_line(label, found, dense) for (label, _), found in methods.items()]
    return sorted(lines, key=lambda line: (line.family != "dense", line.family, line.executed))


def _line(label: str, rows: Sequence[Row], dense: dict[str, float]) -> Line:
    results = [row.result for row in rows]
    mean = lambda name: float(np.mean([result[name] for result in results]))
    changes = [
        np.log(row.result["perplexity"] / dense[row.point.prompt_sha256])
        for row in rows
        if row.point.task in _TEXTS and row.point.prompt_sha256 in dense
    ]
    answers: dict[str, tuple[int, int]] = {}
    for row in sorted(rows, key=lambda row: row.point.task):
        if (right := row.result["answer_right"]) is not None:
            before, asked = answers.get(row.point.task, (0, 0))
            answers[row.point.task] = (before + right, asked + 1)
    return Line(
        method=label,
        prompts=len(rows),
        executed=mean("executed"),
        visited=mean("visited"),
        kl=mean("kl"),
        top1=mean("top1"),
        perplexity_change=float(np.expm1(np.mean(changes))) if changes else None,
        answers=answers,
        prefill_seconds=float(np.median([np.median(r["prefill_seconds"]) for r in results])),
    )


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a group's table; a count of prompts only where methods differ in it."""
    tasks = sorted({task for line in lines for task in line.answers})
    uneven = len({line.prompts for line in lines}) > 1

    def cells(line: Line) -> list[str]:
        change = line.perplexity_change
        answers = [line.answers.get(task) for task in tasks]
        return [
            line.method,
            *([f"{line.prompts}"] if uneven else []),
            f"{line.executed:.1%}",
            f"{line.visited:.1%}",
            f"{line.kl:.2g}",
            f"{line.top1:.1%}",
            "" if change is None else f"{change:+.2%}",
            f"{line.prefill_seconds:.3g} s",
            *("" if answer is None else f"{answer[0]}/{answer[1]}" for answer in answers),
        ]

    return ["method", *(["prompts"] if uneven else []), *_HEADINGS, *tasks], [*map(cells, lines)]


def table(group: Group, lines: Sequence[Line]) -> Table:
    """A group's lines, for people at a terminal."""
    headings, rows = _cells(lines)
    result = Table(title=group.title, title_justify="left", box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        result.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for cells in rows:
        result.add_row(*cells)
    return result


def group_markdown(lines: Sequence[Line]) -> str:
    """A group's lines as a table in Markdown."""
    headings, rows = _cells(lines)
    body = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def markdown(groups: dict[Group, list[Line]]) -> str:
    """All groups as Markdown, with what the columns mean."""
    parts = ["# Methods compared with dense attention", LEGEND]
    for group, lines in groups.items():
        parts += [f"## {group.title}", group_markdown(lines)]
    return "\n\n".join(parts) + "\n"
