"""Rows of a comparison's record: what each measured, and how those of a killed run are found."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.errors import reported_as_user_error
from experiments.common.record import environment, read_records, remove_cut_line

KIND = "compare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What one record measures; a restarted run knows by it what it already has.

    Attributes:
        model: name of the model's file or folder.
        model_sha256: of its configuration and part of its weights.
        prompt: name of the prompt.
        task: its task.
        prompt_sha256: of its tokens and the answer's.
        tokens: of the prompt.
        length: tokens that it is padded to.
        method: label of the method.
        patterns_sha256: of the pattern file, if there is one.
        positions: compared, from the end of the prompt.
        repeats: runs of the prefill, each timed.
    """

    model: str
    model_sha256: str
    prompt: str
    task: str
    prompt_sha256: str
    tokens: int
    length: int
    method: str
    patterns_sha256: str | None
    positions: int
    repeats: int


class Row(NamedTuple):
    """One method on one prompt.

    Attributes:
        point: what was measured.
        result: its figures.
        made: device and revision that it was measured with.
    """

    point: Point
    result: dict[str, Any]
    made: tuple[str | None, ...]


def row_of(record: dict[str, Any]) -> Row:
    """The row that a record holds."""
    made = tuple(record["environment"][name] for name in ("device", "git"))
    return Row(Point(**record["config"]), record["result"], made)


def read_all(path: Path) -> list[Row]:
    """Returns the rows in a file, oldest first, none if it is missing.

    Rows of older versions, which did not say all that a `Point` does, are left out. A last line
    that a kill cut off is removed from the file.

    Raises:
        UserError: another line is no record, or the file cannot be read.
    """
    if not path.exists():
        return []
    with reported_as_user_error(OSError, ValueError):
        remove_cut_line(path)
        records = read_records(path, kind=KIND)
    names = {field.name for field in dataclasses.fields(Point)}
    return [row_of(record) for record in records if record["config"].keys() == names]


def read_rows(path: Path) -> dict[Point, Row]:
    """Returns the rows in a file that this revision measured on this device; see `read_all`."""
    here = environment([])
    rows = [row for row in read_all(path) if row.made == (here["device"], here["git"])]
    return {row.point: row for row in rows}
