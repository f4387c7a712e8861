"""A whole report in Markdown, and its headline tables."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.common.methods import slug
from experiments.compare.summary import LEGEND
from experiments.report import paper, sections, texts
from experiments.report.markdown import Block
from experiments.report.measured import (
    Comparison,
    comparison_section,
    latency_sections,
    read_comparisons,
    ttft_sections,
)
from experiments.report.paper import Printed
from experiments.report.read import Entry
from experiments.report.scores import Scored
from experiments.report.texts import Read

# How a page begins: nothing else is written over.
MARK = "<!-- made by minference report: changes are lost -->"
_TITLES = {
    "needle": "Needle in a haystack",
    "ruler": "RULER",
    "infinitebench": "InfiniteBench",
    "scbench": "Conversations, in the manner of SCBench",
}
# Tables of the paper that stand beside records of a kind.
_PRINTED: dict[str, tuple[Printed, ...]] = {
    "needle": (),
    "ruler": paper.RULER,
    "infinitebench": (*paper.INFINITEBENCH, paper.SNAPKV),
    "perplexity": (paper.PERPLEXITY,),
    "latency": (paper.PREFILL,),
    "ttft": (paper.PREFILL,),
}
_LEGEND = (
    "Made by `minference report` from records. Scores are in percent, means over tasks and lengths "
    "that all count the same, in brackets 95 % intervals: Wilson's for a score, and Agresti and "
    "Min's for the difference from dense attention on the same samples. They tell what other "
    "samples would give, not other models or texts. "
    "An interval that holds 0 proves no equality: only its ends bound the loss. "
    "`visited`: pairs of query and key, of dense attention's; times and the cache are of one "
    "prompt, compilation apart. What was measured with another revision, device, seed, other "
    "options or samples is in a table of its own."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What records hold, by kind.

    Attributes:
        scored: studies of evaluations that score answers, by kind.
        read: of perplexity.
        compared: comparisons.
        entries: all records.
    """

    scored: dict[str, list[Scored]]
    read: list[Read]
    compared: list[Comparison]
    entries: Sequence[Entry]


def make_report(entries: Sequence[Entry]) -> Report:
    """Groups records; raises UserError if one is not as this version writes it."""
    return Report(
        scored={kind: sections.scored(entries, kind) for kind in _TITLES},
        read=texts.read_texts(entries),
        compared=read_comparisons(entries),
        entries=entries,
    )


def page(report: Report, folder: Path) -> Iterator[Block]:
    """Yields the whole page, which is to lie in a folder."""
    yield from (MARK, "# Results", _LEGEND)
    named = _names()
    for kind, studies in report.scored.items():
        if studies:
            yield f"## {_TITLES[kind]}"
        for study in studies:
            yield from sections.section(study, folder, named(kind, study.files[0]))
    if report.read:
        yield from ("## Perplexity", texts.LEGEND)
    for study in report.read:
        yield from texts.section(study, folder, named("perplexity", study.files[0]))
    if report.compared:
        yield from ("## Next tokens beside dense attention's", LEGEND)
    for one in report.compared:
        yield from comparison_section(one, folder, named("compare", one.path))
    if layers := list(latency_sections(report.entries, folder)):
        yield from ("## Attention alone", *layers)
    if whole := list(ttft_sections(report.entries, folder)):
        yield from ("## Time to first token", *whole)
    kinds = {entry.record["kind"] for entry in report.entries}
    if kinds & _PRINTED.keys():
        yield from ("## The paper's own figures", paper.COMPARABLE)
    printed = [one for kind, tables in _PRINTED.items() if kind in kinds for one in tables]
    for one in {id(one): one for one in printed}.values():
        yield f"{one.name}: {one.what}, {one.model}."
        yield one.markdown()
    if "needle" in kinds:
        yield paper.NEEDLE


def _names() -> Callable[[str, Path], str]:
    """Names for pictures by the files of their records, so that other records do not move them."""
    used: Counter[str] = Counter()

    def named(kind: str, path: Path) -> str:
        what = path.parent.name if path.stem == "record" else path.stem
        name = what if what.startswith(kind) else f"{kind}-{slug(what)}"
        used[name] += 1
        return name if used[name] == 1 else f"{name}-{used[name]}"

    return named
