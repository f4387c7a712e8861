"""A whole run: the stages in their order, for each method, and its record."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common.calibration import Attentions
from experiments.common.methods import Method, parse_methods
from experiments.evaluation.answer import Answerer, Batch
from experiments.evaluation.begin import begin
from experiments.evaluation.folder import claim_calibrations, write_record
from experiments.evaluation.options import Evaluation
from experiments.evaluation.predict import Prediction, predict, read_predictions, tokenise
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft, Metric, Score, prepare, score
from models import Model

# Options that may change when a run goes on: what is there stays as it is.
_FREE = ("output", "limit", "methods", "batch_size")


class Mean(NamedTuple):
    """Mean over the samples of a task and a length.

    Attributes:
        task: the task.
        length: tokens that the prompts were made for.
        samples: how many there are.
        score: how right answers are, 0 to 1.
        density: share of the causal pairs visited.
        prefill_seconds: to the first token of a prompt, compilation apart.
        decode_seconds: from there to the end of an answer, compilation apart.
        cache_bytes: of the keys and values of a prompt and its answer.
    """

    task: str
    length: int
    samples: int
    score: float
    density: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: float


_AVERAGED = Mean._fields[3:]

# Letters of a table's column of a method, and of all that is before it.
_METHOD_WIDTH = 10
_FIRST_WIDTH = 45

# Costs of samples as they are shown.
COSTS: dict[str, Callable[[list[Score]], str]] = {
    "pairs visited, %": lambda group: f"{100 * _average(group, 'density'):.1f}",
    "prefill, s": lambda group: f"{_average(group, 'prefill_seconds'):.3g}",
    "decoding, s": lambda group: f"{_average(group, 'decode_seconds'):.3g}",
    "cache, MiB": lambda group: f"{_average(group, 'cache_bytes') / 2**20:,.4g}",
}


def evaluate(
    config: Evaluation,
    *,
    settings: dict[str, Any],
    drafts: Callable[[Model], Sequence[Draft]],
    metric: Metric,
) -> dict[str, list[Score]]:
    """Runs the stages with each method, and writes its record.

    The model is loaded and the samples are prepared once.

    Args:
        config: the options.
        settings: what else decides the samples, for example a digest of a text.
        drafts: the samples of a model before they are made.
        metric: how right an answer is.

    Returns:
        The scores of each method by its label.

    Raises:
        UserError: an input cannot be used, or the folder holds another run.
    """
    folder = config.folder
    model, methods, attentions, folders, wanted = begin(
        config, parse_methods(config.methods), free=_FREE, settings=settings, drafts=drafts
    )
    samples = prepare(folder, wanted)
    prompts = functools.cache(lambda: tokenise(samples, model, chat=config.chat))
    answerer = Answerer(model, chunk_size=config.model.chunk_size)
    found = {}
    lengths = [sample.length for sample in samples]
    for method in methods:
        own = folders[method.label]
        about = claim_calibrations(own, attentions.calibrations(method, lengths, asks=True))
        apply = functools.partial(_with_method, method=method, attentions=attentions, model=model)
        predictions = _known(own, samples) or predict(
            own, prompts(), apply(answerer), model.tokenizer.decode, batch_size=config.batch_size,
            name=method.label, compile_for=apply(answerer.compile),
        )  # fmt: skip
        found[method.label] = score(own, samples, predictions, metric)
        result = {
            "means": [mean._asdict() for mean in means(found[method.label])],
            "scores": {one.name: one.score for one in found[method.label]},
            **about,
        }
        write_record(folder, method, kind=config.kind, config=config, result=result)
    return found


def _with_method(
    function: Callable[..., Any], method: Method, attentions: Attentions, model: Model
) -> Callable[[Batch], Any]:
    """A function of batches, attention and compression, with those of a method."""
    compression = method.compression(model.config.num_layers)
    return lambda batch: function(
        batch, attentions.at(method, batch.length, asks=True), compression
    )


def _known(folder: Path, samples: Sequence[Sample]) -> list[Prediction]:
    """The predictions of a method if none is missing, otherwise none of them."""
    known = read_predictions(folder)
    missing = any(sample.name not in known for sample in samples)
    return [] if missing else [known[sample.name] for sample in samples]


def means(scores: Sequence[Score]) -> list[Mean]:
    """Returns the means of each task and length, in the order in which they come first."""
    groups: dict[tuple[str, int], list[Score]] = {}
    for one in scores:
        groups.setdefault((one.task, one.length), []).append(one)
    return [
        Mean(*at, len(group), *(_average(group, name) for name in _AVERAGED))
        for at, group in groups.items()
    ]


def table(scores: dict[str, list[Score]], *, title: str) -> Table:
    """Returns a column for each method: its scores, then what each length costs per prompt."""
    found = Table(title=title)
    add_first(found)
    add_methods(found, list(scores))
    of_methods = [means(of_method) for of_method in scores.values()]
    for row in zip(*of_methods, strict=True):
        cells = (f"{100 * mean.score:.1f}" for mean in row)
        found.add_row(row[0].task, f"{row[0].length:,}", str(row[0].samples), *cells)
    add_costs(found, scores)
    return found


def add_costs(found: Table, scores: Mapping[str, Sequence[Score]]) -> None:
    """Adds what each length costs per prompt to a table of task, tokens, samples and methods."""
    lengths = dict.fromkeys(one.length for one in next(iter(scores.values())))
    for name, cell in COSTS.items():
        found.add_section()
        for length in lengths:
            groups = [[one for one in each if one.length == length] for each in scores.values()]
            found.add_row(name, f"{length:,}", str(len(groups[0])), *map(cell, groups))


def add_first(found: Table) -> None:
    """Adds the columns of tasks, tokens and samples."""
    found.add_column("score, %", no_wrap=True)
    for name in ("tokens", "samples"):
        found.add_column(name, justify="right", no_wrap=True)


def add_methods(found: Table, labels: Sequence[str]) -> None:
    """Adds a column for each method to a table; long labels take several lines."""
    for label in labels:
        found.add_column(label, justify="right", overflow="fold", min_width=_METHOD_WIDTH)


def make_room(console: Console, methods: int) -> None:
    """Makes lines long enough for such a table: a figure cut short would be lost."""
    console.width = max(console.width, _FIRST_WIDTH + (_METHOD_WIDTH + 3) * methods)


def _average(scores: Sequence[Score], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in scores]))
