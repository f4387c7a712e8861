"""The sections of a report on comparisons and on latency, in Markdown."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.compare.report import picture as quality_picture
from experiments.compare.rows import Point, Row, row_of
from experiments.compare.summary import Group, Line, group_markdown, summarise
from experiments.latency import rows as latency
from experiments.latency.plot import times_picture
from experiments.latency.table import rows_markdown
from experiments.report.markdown import Block, Drawing, below, link, short_revision
from experiments.report.read import Entry, as_this_version_writes

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
    found: dict[tuple[Path, str, str | None], list[Entry]] = {}
    for entry in entries:
        if entry.record["kind"] == "latency":
            with as_this_version_writes(entry):
                environment = entry.record["environment"]
                latency.rows_of([entry.record])
            key = (entry.path, environment["device"], environment["git"])
            found.setdefault(key, []).append(entry)
    for number, ((path, device, git), group) in enumerate(found.items(), start=1):
        rows = latency.rows_of([entry.record for entry in group])
        shown = {point: row for point, row in rows.figures.items() if point.level in _LEVELS}
        layers = sorted({point.layer for point in rows.figures})
        yield f"### One layer of {', '.join(layers)}, revision {short_revision(git)}"
        yield f"{device}. Record, with the kernels' own rows: {link(path, folder)}."
        if shown:
            yield rows_markdown(dataclasses.replace(rows, figures=shown))
        draw = functools.partial(times_picture, rows)
        yield Drawing(f"latency-{number}", f"Milliseconds by length, {', '.join(layers)}", draw)
