"""Records from files and folders; what cannot be read is told with its file and line."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.common.errors import UserError, one_line
from experiments.common.record import parse_record

KINDS = ("needle", "ruler", "infinitebench", "scbench", "perplexity", "compare", "latency", "ttft")
# Tables made from rows that stand before them in the same file: they are made again.
_DERIVED = ("compare_summary",)
# What a run keeps beside its record.
_PARTS = ("samples.jsonl", "predictions.jsonl", "scores.jsonl", "rows.jsonl")
_NAMED = 3  # of the files that are left out


class Entry(NamedTuple):
    """A record and where it stands: its file, and the number of its line, counted from 1."""

    path: Path
    line: int
    record: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"{self.path}, line {self.line}"


def read_entries(paths: Sequence[Path], console: Console) -> list[Entry]:
    """Returns the records of files, and of all JSONL files in folders, in order.

    In folders, files that do not begin with a record of `KINDS` are left out, which is told of all
    but the samples and answers that runs keep beside their records.

    Args:
        paths: files and folders; a file named twice is read once.
        console: where it is told what is left out.

    Raises:
        UserError: there is no path, or one does not exist, or a file cannot be read or holds lines
            that are no records of `KINDS`, or there is no record at all.
    """
    if not paths:
        raise UserError(
            "expected record files or folders of them, got none; name what the commands "
            f"{', '.join(KINDS)} have written"
        )
    entries: list[Entry] = []
    left_out: list[Path] = []
    for file, in_folder in dict(part for path in paths for part in _files(path)).items():
        lines = _whole_lines(file, console)
        if in_folder and not _begins_with_record(file, lines):
            left_out += [file] if file.name not in _PARTS else []
            continue
        found = [entry for entry in _entries(file, lines) if entry.record["kind"] in KINDS]
        if not found:
            raise UserError(f"{file} holds no records; name a file that a command has written")
        entries += found
    if left_out:
        names = ", ".join(map(str, left_out[:_NAMED])) + (
            "" if len(left_out) <= _NAMED else f" and {len(left_out) - _NAMED} more"
        )
        console.print(
            f"left out, without records that a report shows: {names}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if not entries:
        raise UserError(f"there are no records in {', '.join(map(str, paths))}; check the path")
    return entries


@contextlib.contextmanager
def as_this_version_writes(entry: Entry) -> Iterator[None]:
    """Tells the record that does not hold what is looked for inside the block."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{entry.place}: not as this version of `minference {entry.record['kind']}` writes it "
            f"({type(error).__name__}: {one_line(error)}); run it again, or leave the record out"
        ) from error


def _files(path: Path) -> Iterator[tuple[Path, bool]]:
    """The files that a path stands for, and whether they are of a folder."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; check the path")
    if path.is_dir():
        yield from ((file.resolve(), True) for file in sorted(path.rglob("*.jsonl")))
    else:
        yield path.resolve(), False


def _begins_with_record(path: Path, lines: Sequence[str]) -> bool:
    try:
        return next(_entries(path, lines), None) is not None
    except UserError:
        return False


def _whole_lines(path: Path, console: Console) -> list[str]:
    """Lines with their end: a kill may have cut off the last one, or it is just being written."""
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if rest:
        console.print(
            f"left out: {path}, line {len(lines) + 1}: it is cut off", soft_wrap=True,
            highlight=False,
        )  # fmt: skip
    return lines


def _entries(path: Path, lines: Sequence[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_record(line, f"{path}, line {number}")
        except ValueError as error:
            raise UserError(one_line(error)) from error
        entry = Entry(path, number, record)
        kind = record.get("kind")
        if kind not in (*KINDS, *_DERIVED):
            raise UserError(
                f"{entry.place}: a record of kind {kind!r}, which no table shows; expected one of "
                f"{', '.join(KINDS)}"
            )
        if missing := [
            name
            for name in ("environment", "config", "result")
            if not isinstance(record.get(name), dict)
        ]:
            raise UserError(f"{entry.place}: a record without {', '.join(missing)}")
        yield entry
