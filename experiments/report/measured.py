"""The sections of a report on comparisons, latency and time to first token, in Markdown."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.compare.report import picture as quality_picture
from experiments.compare.rows import Point, Row, row_of
from experiments.compare.summary import Group, Line, group_markdown, summarise
from experiments.latency import rows as latency
from experiments.latency.plot import times_picture
from experiments.latency.table import rows_markdown
from experiments.report.markdown import Block, Drawing, below, link, short_revision
from experiments.report.read import Entry, as_this_version_writes
from experiments.ttft import rows as ttft
from experiments.ttft.plot import parts_picture, seconds_picture
from experiments.ttft.table import markdown as ttft_markdown

# Of a latency record's rows; those of kernels alone are in the command's own table.
_LEVELS = ("layer", "peer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups of a file's rows that one revision measured on one device.

    Attributes:
        path: of the file.
        device: that it ran on.
        git: revision of the code.
        groups: lines of each model and length.
        alone: whether the file holds no others.
    """

    path: Path
    device: str
    git: str | None
    groups: dict[Group, list[Line]]
    alone: bool

    def caption(self, folder: Path) -> str:
        """What the tables were made from."""
        record = link(self.path, folder)
        return f"{self.device}, revision {short_revision(self.git)}. Record: {record}."


def read_comparisons(entries: Sequence[Entry]) -> list[Comparison]:
    """Returns the comparisons in records: each file's, device's and revision's apart.

    Raises:
        UserError: a record is not as this version writes it.
    """
    names = {field.name for field in dataclasses.fields(Point)}
    found: dict[tuple[Path, tuple[str | None, ...]], list[Row]] = {}
    for entry in entries:
        if entry.record["kind"] != "compare":
            continue
        with as_this_version_writes(entry):
            if entry.record["config"].keys() != names:
                raise ValueError(f"expected the settings {', '.join(sorted(names))}")
            row = row_of(entry.record)
            summarise([row])
        found.setdefault((entry.path, row.made), []).append(row)
    parts = Counter(path for path, _ in found)
    return [
        Comparison(
            path=path, device=str(made[0]), git=made[1], groups=summarise(rows),
            alone=parts[path] == 1,
        )
        for (path, made), rows in found.items()
    ]  # fmt: skip


def comparison_section(one: Comparison, folder: Path, name: str) -> Iterator[Block]:
    """Yields the section of a comparison; see `sections.section`."""
    for number, (group, lines) in enumerate(one.groups.items()):
        yield f"### {group.title}"
        if number == 0:
            yield one.caption(folder)
        yield group_markdown(lines)
    what = "Next-token KL from dense against the share executed, each method"
    drawn = one.path.with_suffix(".png")
    # The command has drawn its record, if one revision made all of it.
    if one.alone and drawn.exists() and (where := below(drawn, folder)):
        yield f"![{what}]({where})"
    else:
        yield Drawing(name, what, functools.partial(_draw_quality, one.groups))


def _draw_quality(groups: dict[Group, list[Line]], path: Path) -> None:
    quality_picture(groups, path=path)


def latency_sections(entries: Sequence[Entry], folder: Path) -> Iterator[Block]:
    """Yields a section for each file, device and revision; see `sections.section`."""
    for number, (group, revision) in enumerate(_of_kind(entries, "latency", latency.rows_of), 1):
        rows = latency.rows_of([entry.record for entry in group])
        shown = {point: row for point, row in rows.figures.items() if point.level in _LEVELS}
        layers = sorted({point.layer for point in rows.figures})
        device = group[0].record["environment"]["device"]
        yield f"### One layer of {', '.join(layers)}, revision {revision}"
        yield f"{device}. Record, with the kernels' own rows: {link(group[0].path, folder)}."
        if shown:
            yield rows_markdown(dataclasses.replace(rows, figures=shown))
        draw = functools.partial(times_picture, rows)
        yield Drawing(f"latency-{number}", f"Milliseconds by length, {', '.join(layers)}", draw)


def ttft_sections(entries: Sequence[Entry], folder: Path) -> Iterator[Block]:
    """Yields a section for each file, device and revision; see `sections.section`."""
    for number, (group, revision) in enumerate(_of_kind(entries, "ttft", ttft.rows_of), 1):
        rows = ttft.rows_of([entry.record for entry in group])
        models = ", ".join(sorted({point.model for point in rows.figures}))
        yield f"### {models}, revision {revision}"
        yield f"Record: {link(group[0].path, folder)}."
        yield ttft_markdown(rows)
        draw = functools.partial(seconds_picture, rows)
        yield Drawing(f"ttft-{number}", f"Seconds to first token by length, {models}", draw)
        if any("parts" in row for row in rows.figures.values()):
            draw = functools.partial(parts_picture, rows)
            yield Drawing(f"ttft-{number}-parts", f"Where the time goes, {models}", draw)


def _of_kind(
    entries: Sequence[Entry], kind: str, read: Callable[[list[dict[str, Any]]], Any]
) -> Iterator[tuple[list[Entry], str]]:
    """Records of a kind by file, device and revision, and the revision in short."""
    found: dict[tuple[Path, str, str | None], list[Entry]] = {}
    for entry in entries:
        if entry.record["kind"] == kind:
            with as_this_version_writes(entry):
                environment = entry.record["environment"]
                read([entry.record])
            key = (entry.path, environment["device"], environment["git"])
            found.setdefault(key, []).append(entry)
    for (_, _, git), group in found.items():
        yield group, short_revision(git)
