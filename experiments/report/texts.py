"""The section of a report on perplexity, in Markdown."""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.plotting import short_tokens
from experiments.perplexity.measure import Mean, Row, means
from experiments.perplexity.plot import curves_picture
from experiments.report.markdown import Block, Drawing, percent, table
from experiments.report.read import Entry
from experiments.report.study import Study, studies

Read = Study[list[Row]]
LEGEND = (
    "Perplexity of the beginnings of texts. `over dense`: how much larger it is than dense "
    "attention's, and the standard error over texts, of differences on the same text. `KL`: of the "
    "next token from dense attention's, nats. Of a continuation only its tokens are scored, which "
    "were read densely onto what is kept of those before, the prompt: `visited` is of the prompt, "
    "`cache` what is kept of it, and `dense` keeps all in the model's type."
)


def read_texts(entries: Sequence[Entry]) -> list[Read]:
    """Returns the studies of perplexity."""
    return studies((entry for entry in entries if entry.record["kind"] == "perplexity"), _rows)


def _rows(record: dict[str, Any]) -> list[tuple[None, Iterable[Hashable], list[Row]]]:
    rows = [Row(**row) for row in record["result"]["rows"]]
    if means(rows) != [Mean(**mean) for mean in record["result"]["means"]]:
        raise ValueError("the means are not those of the rows")
    return [(None, [(row.sha256, row.length) for row in rows], rows)]


def title(study: Read) -> str:
    """Returns model and lengths in words."""
    curve = _curve(study)
    ends = dict.fromkeys(short_tokens(mean.length) for mean in (curve[0], curve[-1]))
    return f"{study.model}, {' to '.join(ends)} tokens"


def section(study: Read, folder: Path, name: str) -> list[Block]:
    """Returns the section of one study; see `sections.section`."""
    curves = {label: means(rows) for label, rows in study.methods.items()}
    first, continuation = _curve(study), study.settings.get("continuation")
    rows = []
    for place, mean in enumerate(first):
        for label, curve in curves.items():
            one = curve[place]
            rows.append([
                f"{mean.length:,}", label, f"{one.perplexity:.3f}",
                change(study.methods[label], mean.length), f"{one.kl:.4f}", percent(one.top1),
                percent(one.density), *_mebibytes(one),
            ])  # fmt: skip
    headings = ["tokens", "method", "perplexity", "over dense, %", "KL", "same token, %"]
    headings += ["visited, %", *["cache, MiB"] * bool(_mebibytes(first[0]))]
    last = "" if continuation is None else f", continuations of {continuation}"
    draw = lambda path: curves_picture(curves, title=f"{study.model}{last}", path=path)
    return [
        f"### {title(study)}{last}",
        study.caption(folder, number_of_texts(study)),
        table(headings, rows),
        Drawing(name, f"Perplexity by length, {study.model}{last}", draw),
    ]


def number_of_texts(study: Read) -> str:
    """Returns how many texts were read, in words."""
    number = _curve(study)[-1].texts
    return f"{number} text{'s' * (number != 1)}"


def change(rows: Sequence[Row], length: int) -> str:
    """Returns how much larger perplexity is than dense attention's, in percent.

    With it the standard error over texts, of differences on the same text, if there are several.
    """
    more = np.array([row.nll - row.dense_nll for row in rows if row.length == length])
    ratio = np.exp(more.mean())
    text = f"{100 * (ratio - 1):+.2f}"
    text = "0.00" if text in ("+0.00", "-0.00") else text
    if len(more) < 2:
        return text
    return f"{text} ± {100 * ratio * more.std(ddof=1) / np.sqrt(len(more)):.2f}"


def headline(study: Read, label: str) -> str:
    """Returns `change` at the longest length, and the pairs visited."""
    if label not in study.methods:
        return ""
    rows = study.methods[label]
    longest = means(rows)[-1]
    cache = "".join(f", {size} MiB" for size in _mebibytes(longest))
    return f"{change(rows, longest.length)}<br>{percent(longest.density)} %{cache}"


def _mebibytes(mean: Mean) -> list[str]:
    """The size of the prompt's cache, nothing if texts were read at once."""
    return [] if mean.cache_bytes is None else [f"{mean.cache_bytes / 2**20:,.4g}"]


def _curve(study: Read) -> list[Mean]:
    return means(next(iter(study.methods.values())))
