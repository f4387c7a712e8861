"""`minference compare`: any methods and budgets on a model and prompts, beside dense attention."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tqdm import tqdm

from experiments.common.calibration import Attentions
from experiments.common.errors import UserError, check_writable
from experiments.common.fingerprint import fingerprint
from experiments.common.methods import Method, dense, for_model, parse_whole_cache_methods, usage
from experiments.common.options import LoadOptions, at_least
from experiments.common.programs import Programs
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.compare.measure import Subject, figures, read
from experiments.compare.programs import compile_all
from experiments.compare.prompts import ComparePrompts, Reading, tokenise_all
from experiments.compare.report import WIDTH, table, write_report
from experiments.compare.rows import KIND, Point, Row, read_rows, row_of
from experiments.compare.summary import table as summary_table
from models import Model

SUMMARY = "compare_summary"
DEFAULTS = (
    "a_shape:128,512", "a_shape:128,1024", "vertical_slash:200,100", "vertical_slash:500,300",
    "vertical_slash:1000,1000", "threshold:0.3", "threshold:0.1", "hybrid:0.3,200",
    "hybrid:0.1,500", "xattention:0.8", "xattention:0.9",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare methods: how much of dense attention each executes, and what that costs in quality.

    Dense attention reads every prompt once; then each method does, and its next-token distributions
    are compared with dense's at the prompt's last positions. Every row is kept in the record as
    soon as it is measured; a run that was stopped goes on where it was.
    """

    model: LoadOptions
    prompt: ComparePrompts = dataclasses.field(default_factory=ComparePrompts)
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=f"Methods with their budgets: {usage()}.",
        ),
    ] = DEFAULTS
    positions: int = 8192
    """Last positions of each prompt that are compared; all of a shorter prompt."""
    repeats: int = 1
    """Runs of each prefill, all timed; the median is shown."""
    record: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/compare.jsonl")
    """JSONL file of the rows; tables over all prompts (.md) and the picture (.png) go beside it."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        at_least("positions", self.positions, 2)
        at_least("repeats", self.repeats, 1)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        named = parse_whole_cache_methods(
            self.methods, why="compare looks at the prompt's last positions, before decoding"
        )
        methods = [dense(), *(method for method in named if method != dense())]
        sources = self.prompt.read()
        check_writable(self.record, folder=False)
        known = read_rows(self.record)
        model = load(self.model, progress)
        methods = for_model(methods, model, progress)
        # A method for another model is told before any work.
        attentions = Attentions(methods, model, chat=self.prompt.chat)
        readings = tokenise_all(model, sources, chat=self.prompt.chat)
        rows = self._rows(model, readings, methods, attentions, known)
        console.width = max(console.width, WIDTH)  # a figure cut short would be lost
        console.print(table(rows))
        groups, paths = write_report(self.record)
        for group, lines in groups.items():
            if any(group.holds(row.point) for row in rows):
                console.print("", summary_table(group, lines))
                result = {"methods": [dataclasses.asdict(line) for line in lines]}
                append_record(self.record, kind=SUMMARY, argv=sys.argv, config=group, result=result)
        for path in (self.record, *paths):
            console.print(f"written: {path}", soft_wrap=True)

    def _rows(
        self,
        model: Model,
        readings: Sequence[Reading],
        methods: Sequence[Method],
        attentions: Attentions,
        known: dict[Point, Row],
    ) -> list[Row]:
        """The rows of all prompts and methods, dense first; those not known are measured."""
        sha256 = fingerprint(model)
        programs = Programs()
        answer_room = max(len(reading.answer) for reading in readings)
        wanted: list[tuple[Subject, dict[Method, Point]]] = []
        missing: list[tuple[Subject, dict[Method, Point]]] = []
        for reading in readings:
            subject = Subject(
                model=model, reading=reading, positions=self.positions, answer_room=answer_room,
                repeats=self.repeats, programs=programs,
            )  # fmt: skip
            points = {method: self._point(subject, method, sha256) for method in methods}
            wanted.append((subject, points))
            lacks = lambda method, at, reading=reading: (
                at not in known
                or known[at].result.get("calibration") != _calibration(attentions, method, reading)
            )
            missing.append((subject, {x: at for x, at in points.items() if lacks(x, at)}))
        at = lambda subject, method: attentions.at(
            method, subject.reading.length, asks=subject.reading.asks
        )
        compile_all(
            [
                (subject, at(subject, method))
                for subject, points in missing
                for method in (dict.fromkeys([methods[0], *points]) if points else ())
            ]
        )
        left = sum(len(points) for _, points in missing)
        total = len(readings) * len(methods)
        with tqdm(total=total, initial=total - left, unit="row", disable=None) as bar:
            for subject, points in missing:
                for method, result in _measure(subject, points, methods[0], at):
                    made_with = _calibration(attentions, method, subject.reading)
                    if made_with is not None:
                        result["calibration"] = made_with
                    known[points[method]] = self._keep(points[method], result)
                    bar.set_description(f"{subject.reading.name}: {method.label}")
                    bar.update()
        return [known[point] for _, points in wanted for point in points.values()]

    def _point(self, subject: Subject, method: Method, model_sha256: str) -> Point:
        reading = subject.reading
        return Point(
            model=Path(self.model.model).name,
            model_sha256=model_sha256,
            prompt=reading.name,
            task=reading.task,
            prompt_sha256=reading.sha256,
            tokens=len(reading.tokens),
            length=reading.length,
            method=method.label,
            patterns_sha256=method.sha256,
            positions=subject.compared,
            repeats=subject.repeats,
        )

    def _keep(self, point: Point, result: dict[str, Any]) -> Row:
        record = append_record(self.record, kind=KIND, argv=sys.argv, config=point, result=result)
        return row_of(record)


def _calibration(attentions: Attentions, method: Method, reading: Reading) -> dict[str, Any] | None:
    """What the record says of the prompt that a method's lines for another come from."""
    found = attentions.calibrations(method, [reading.length], asks=reading.asks)
    return found[0] if found else None


def _measure(
    subject: Subject,
    methods: Collection[Method],
    dense: Method,
    at: Callable[[Subject, Method], Any],
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Figures of one method after the other; dense attention reads the prompt first, once."""
    if not methods:
        return
    run = read(subject, at(subject, dense))
    dense_hidden = run.hidden
    if dense in methods:
        yield dense, figures(subject, run, dense_hidden)
    del run  # two caches at once are not needed
    for method in methods:
        if method != dense:
            yield method, figures(subject, read(subject, at(subject, method)), dense_hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSummary:
    """Make the tables and the picture of `minference compare` again, from its record alone."""

    record: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/compare.jsonl")
    """JSONL file of the rows; tables (.md) and picture (.png) go beside it."""

    def run(self) -> None:
        """Runs the command; raises UserError if there is no row of this version."""
        console = Console()
        groups, paths = write_report(self.record)
        if not groups:
            raise UserError(f"{self.record} holds no rows of `minference compare` as it is now")
        console.width = max(console.width, WIDTH)
        for group, lines in groups.items():
            console.print(summary_table(group, lines), "")
        for path in paths:
            console.print(f"written: {path}", soft_wrap=True)
