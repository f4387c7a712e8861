"""`minference compare`: any methods and budgets on a model and prompts, beside dense attention."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tqdm import tqdm

from experiments.common.errors import UserError, check_writable
from experiments.common.options import LoadOptions, at_least
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.compare.measure import Subject, figures, read
from experiments.compare.methods import FAMILIES, Method, parse_methods
from experiments.compare.prompts import ComparePrompts, Reading, tokenise
from experiments.compare.report import WIDTH, Row, picture, table
from experiments.compare.rows import KIND, Point, fingerprint, read_rows
from models import Model

_USAGE = ", ".join(family.usage(name) for name, family in FAMILIES.items())
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
            help=f"Methods with their budgets: {_USAGE}, patterns:FILE.",
        ),
    ] = DEFAULTS
    positions: int = 8192
    """Last positions of each prompt that are compared; all of a shorter prompt."""
    repeats: int = 1
    """Timed runs of each prefill; the median is shown. 0 takes no times."""
    record: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/compare.jsonl")
    """JSONL file of the rows; the picture goes beside it."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        at_least("positions", self.positions, 2)
        at_least("repeats", self.repeats, 0)
        if not self.methods:
            raise UserError("--methods must name at least one method")

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        methods = parse_methods(self.methods)
        sources = self.prompt.read()
        check_writable(self.record, folder=False)
        known = read_rows(self.record)
        model = load(self.model, progress)
        readings = [tokenise(model, *source, chat=self.prompt.chat) for source in sources]
        for method in methods:  # one for another model is told before any work
            method.attention(model.config.num_layers, model.config.num_heads)
        rows = self._rows(model, readings, methods, known)
        console.width = max(console.width, WIDTH)  # a figure cut short would be lost
        console.print(table(rows))
        title = f"{_name(self.model)}: {', '.join(reading.name for reading in readings)}"
        console.print(f"record: {self.record}", soft_wrap=True)
        path = picture(rows, title=title, path=self.record.with_suffix(".png"))
        console.print(f"picture: {path}", soft_wrap=True)

    def _rows(
        self,
        model: Model,
        readings: Sequence[Reading],
        methods: Sequence[Method],
        known: dict[Point, dict[str, Any]],
    ) -> list[Row]:
        """The rows of all prompts and methods; those that are not known are measured."""
        sha256 = fingerprint(model)
        rows: list[Row] = []
        total = len(readings) * len(methods)
        with tqdm(total=total, desc="comparing", unit="row", disable=None) as bar:
            for reading in readings:
                subject = Subject(
                    model=model,
                    reading=reading,
                    positions=min(self.positions, len(reading.tokens)),
                    repeats=self.repeats,
                )
                points = {method: self._point(subject, method, sha256) for method in methods}
                missing = [method for method, point in points.items() if point not in known]
                bar.set_description(reading.name)
                bar.update(len(methods) - len(missing))
                for method, result in _measure(subject, missing, methods[0]):
                    known[points[method]] = self._keep(points[method], result)
                    bar.set_description(f"{reading.name}: {method.label}")
                    bar.update()
                rows += [
                    Row(reading.name, method, known[point]) for method, point in points.items()
                ]
        return rows

    def _point(self, subject: Subject, method: Method, model_sha256: str) -> Point:
        return Point(
            model=_name(self.model),
            model_sha256=model_sha256,
            prompt=subject.reading.name,
            prompt_sha256=subject.reading.sha256,
            tokens=len(subject.reading.tokens),
            method=method.label,
            patterns_sha256=method.sha256,
            positions=subject.positions,
            repeats=subject.repeats,
        )

    def _keep(self, point: Point, result: dict[str, Any]) -> dict[str, Any]:
        record = append_record(self.record, kind=KIND, argv=sys.argv, config=point, result=result)
        return record["result"]


def _measure(
    subject: Subject, methods: Sequence[Method], dense: Method
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Figures of one method after the other; dense attention reads the prompt first, once."""
    if not methods:
        return
    run = read(subject, dense)
    dense_hidden = run.hidden
    if dense in methods:
        yield dense, figures(subject, dense, run, dense_hidden)
    del run  # two caches at once are not needed
    for method in methods:
        if method != dense:
            yield method, figures(subject, method, read(subject, method), dense_hidden)


def _name(options: LoadOptions) -> str:
    return Path(options.model).name
