"""A whole run: the stages in their order, and its record."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common.errors import check_writable, reported_as_user_error
from experiments.common.fingerprint import fingerprint
from experiments.common.session import load
from experiments.evaluation.folder import claim, settings_of, write_record
from experiments.evaluation.options import Evaluation
from experiments.evaluation.stages import Draft, Metric, Score, limited, predict, prepare, score
from models import Model
from models.common.checks import check_context

# Options that may change when a run goes on: what is there stays as it is.
_FREE = ("output", "limit")


class Mean(NamedTuple):
    """Mean over the samples of a task and a length."""

    task: str
    length: int
    samples: int
    score: float
    density: float


def evaluate(
    config: Evaluation,
    *,
    settings: dict[str, Any],
    drafts: Callable[[Model], Sequence[Draft]],
    metric: Metric,
) -> list[Score]:
    """Runs the stages and writes the record.

    Args:
        config: the options.
        settings: what else decides the samples, for example a digest of a text.
        drafts: the samples of a model before they are made.
        metric: how right an answer is.

    Raises:
        UserError: an input cannot be used, or the folder holds another run.
    """
    folder = config.folder
    check_writable(folder, folder=True)
    config.attention.check_readable()
    claim(folder, {"kind": config.kind, **settings_of(config, free=_FREE), **settings})
    model = load(config.model, Console(stderr=True))
    sizes = model.config
    attention = config.attention.build(num_layers=sizes.num_layers, num_heads=sizes.num_heads)
    claim(folder, {"model_sha256": fingerprint(model)})
    wanted = limited(drafts(model), config.limit)
    with reported_as_user_error(ValueError):
        check_context(max(draft.length for draft in wanted), sizes)
    samples = prepare(folder, wanted)
    answers = predict(
        folder, samples, model, attention, chat=config.chat, chunk_size=config.model.chunk_size
    )
    scores = score(folder, samples, answers, metric)
    result = {
        "attention": config.attention.describe(),
        "means": [mean._asdict() for mean in means(scores)],
        "scores": {one.name: one.score for one in scores},
    }
    write_record(folder, kind=config.kind, config=config, result=result)
    return scores


def means(scores: Sequence[Score]) -> list[Mean]:
    """Returns the means of each task and length, in the order in which they come first."""
    groups: dict[tuple[str, int], list[Score]] = {}
    for one in scores:
        groups.setdefault((one.task, one.length), []).append(one)
    return [
        Mean(
            *group,
            samples=len(members),
            score=float(np.mean([one.score for one in members])),
            density=float(np.mean([one.density for one in members])),
        )
        for group, members in groups.items()
    ]


def table(scores: Sequence[Score], *, title: str) -> Table:
    """Returns the means for people."""
    found = Table("task", title=title)
    for name in ("tokens", "samples", "score, %", "pairs visited, %"):
        found.add_column(name, justify="right")
    for mean in means(scores):
        task, length, samples, right, density = mean
        found.add_row(
            task, f"{length:,}", str(samples), f"{100 * right:.1f}", f"{100 * density:.1f}"
        )
    return found
