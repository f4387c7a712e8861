"""The results section of a README: a table of each model, and what a comparison comes to."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.errors import UserError
from experiments.report import sections, texts
from experiments.report.markdown import link, short_revision, table
from experiments.report.measured import Comparison
from experiments.report.page import Report
from experiments.report.scores import samples_in_words
from experiments.report.study import Study

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Divergence from dense attention that is told as close, nats.
_CLOSE = 0.02
# They compute every score, or they are dense attention.
_ORACLES = ("dense", "block_mass", "top_k")
_LEGEND = (
    "Averages in percent, over all tasks and lengths; in brackets the 95 % interval of their "
    "difference from dense attention on the same samples, in points; below them, at the longest "
    "length, the pairs visited and the seconds to read a prompt. Perplexity: change from dense "
    "attention's at the longest length, in percent, ± its standard error; of a continuation, "
    "below it what is kept of the prompt."
)


def replaced(text: str, section: str, path: Path) -> str:
    """Returns a README with another section of results.

    Raises:
        UserError: there is no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{path} has no lines {BEGIN} and {END}; put them where results belong")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


class _Column(NamedTuple):
    """A study in a table: its heading, what it was made from, its methods and their cells."""

    heading: str
    source: str
    labels: list[str]
    cell: Callable[[str], str]


def headline(report: Report, page: Path, folder: Path) -> str:
    """Returns the section: tables of each model and device, and links to all others.

    Args:
        report: what records hold.
        page: that shows all of it.
        folder: of the README.
    """
    parts = []
    columns = _columns(report, folder)
    if columns:
        parts.append(_LEGEND)
    for what, found in columns.items():
        labels = dict.fromkeys(label for column in found for label in column.labels)
        rows = [[f"`{label}`", *(column.cell(label) for column in found)] for label in labels]
        parts += [
            f"**{what}**",
            table(["method", *(column.heading for column in found)], rows),
            " ".join(f"{column.heading}: {column.source}" for column in found),
        ]
    parts += _comparisons(report.compared, folder)
    where = Path(os.path.relpath(page.resolve(), folder.resolve())).as_posix()
    parts.append(f"[All tables and pictures, and the paper's figures]({where}).")
    return "\n\n".join(parts)


def _columns(report: Report, folder: Path) -> dict[str, list[_Column]]:
    """The columns of each model and device."""
    columns: dict[str, list[_Column]] = {}
    for study in (one for some in report.scored.values() for one in some):
        lengths = sections.title(study).partition(", ")[2]
        columns.setdefault(f"{study.model}, {study.device}", []).append(
            _Column(
                f"{_kind(study)}, {lengths}",
                study.source(folder, samples_in_words(study)),
                list(study.methods),
                functools.partial(sections.headline, study),
            )
        )
    for study in report.read:
        lengths = texts.title(study).partition(", ")[2]
        columns.setdefault(f"{study.model}, {study.device}", []).append(
            _Column(
                f"{_kind(study)}, {lengths}",
                study.source(folder, texts.number_of_texts(study)),
                list(study.methods),
                functools.partial(texts.headline, study),
            )
        )
    return columns


def _kind(study: Study[Any]) -> str:
    """The command, and the options that make another experiment of it: `needle --lead`."""
    words = [study.kind]
    for name in ("lead", "rope_scaling", "continuation"):
        value = next((v for k, v in study.settings.items() if k.rpartition(".")[2] == name), None)
        if value:
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def _comparisons(compared: Sequence[Comparison], folder: Path) -> Iterator[str]:
    """What executes least among methods that are close to dense attention."""
    if not compared:
        return
    rows = []
    for one in compared:
        for group, lines in one.groups.items():
            dense = next((line for line in lines if line.method == "dense"), None)
            methods = [line for line in lines if line.family not in _ORACLES]
            close = [line for line in methods if line.kl <= _CLOSE]
            # What one prompt says is no headline.
            if dense is None or not close or len(group.prompts) < 2:
                continue
            line = min(close, key=lambda line: line.executed)
            rows.append([
                group.title, f"`{line.method}`", str(len(methods)), f"{line.executed:.1%}",
                f"{line.kl:.2g}", f"{line.prefill_seconds:.3g} s", f"{dense.prefill_seconds:.3g} s",
                short_revision(one.git), link(one.path, folder),
            ])  # fmt: skip
    yield (
        "Of the methods that `minference compare` read the same prompts with (`of`: how many), "
        "the one that executes least of dense attention's key tiles with a next-token KL of at "
        f"most {_CLOSE}, chosen by these figures themselves:"
    )
    headings = ("prompts", "method", "of", "executed", "KL", "prefill", "dense", "revision")
    yield table([*headings, "record"], rows)
