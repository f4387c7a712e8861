"""A whole run: the stages in their order, for each method, and its record."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.capacities import share_capacities
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.fingerprint import fingerprint
from experiments.common.methods import Method, parse_methods
from experiments.common.session import load
from experiments.evaluation.answer import Answerer
from experiments.evaluation.folder import claim, claim_methods, settings_of, write_record
from experiments.evaluation.options import Evaluation
from experiments.evaluation.predict import Prediction, predict, read_predictions, tokenise
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft, Metric, Score, limited, prepare, score
from experiments.evaluation.summary import means
from models import Model
from models.common.checks import check_context

# Options that may change when a run goes on: what is there stays as it is.
_FREE = ("output", "limit", "methods", "batch_size")


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
    folder, methods = config.folder, parse_methods(config.methods)
    _check_chunks(methods, config.model.chunk_size)
    check_writable(folder, folder=True)
    claim(folder, {"kind": config.kind, **settings_of(config, free=_FREE), **settings})
    folders = claim_methods(folder, methods)
    model = load(config.model, Console(stderr=True))
    claim(folder, {"model_sha256": fingerprint(model)})
    # A method for another model is told before any work.
    sizes = model.config.num_layers, model.config.num_heads
    attentions = share_capacities([method.attention(*sizes) for method in methods])
    wanted = limited(drafts(model), config.limit)
    with reported_as_user_error(ValueError):
        check_context(max(draft.length for draft in wanted), model.config)
    samples = prepare(folder, wanted)
    prompts = functools.cache(lambda: tokenise(samples, model, chat=config.chat))
    answerer = Answerer(model, chunk_size=config.model.chunk_size)
    found = {}
    for method, attention in zip(methods, attentions, strict=True):
        answer = functools.partial(
            answerer, attention=attention, compression=method.compression(sizes[0])
        )
        own = folders[method.label]
        predictions = _known(own, samples) or predict(
            own, prompts(), answer, model.tokenizer.decode, batch_size=config.batch_size,
            name=method.label,
        )  # fmt: skip
        found[method.label] = score(own, samples, predictions, metric)
        result = {
            "means": [mean._asdict() for mean in means(found[method.label])],
            "scores": {one.name: one.score for one in found[method.label]},
        }
        write_record(folder, method, kind=config.kind, config=config, result=result)
    return found


def _check_chunks(methods: Sequence[Method], chunk_size: int | None) -> None:
    for method in methods:
        if chunk_size is not None and method.kept is not None:
            raise UserError(
                f"--methods: {method.label} needs the whole prompt at once; leave out --chunk-size "
                f"or +{method.kept.label}"
            )


def _known(folder: Path, samples: Sequence[Sample]) -> list[Prediction]:
    """The predictions of a method if none is missing, otherwise none of them."""
    known = read_predictions(folder)
    missing = any(sample.name not in known for sample in samples)
    return [] if missing else [known[sample.name] for sample in samples]
