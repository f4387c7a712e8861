"""A whole run of conversations: the stages in their order, and its record."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.common.calibration import Attentions
from experiments.common.errors import UserError
from experiments.common.methods import Method, parse_methods
from experiments.common.programs import Programs
from experiments.evaluation.begin import begin
from experiments.evaluation.folder import claim_calibrations, write_record
from experiments.evaluation.run import means
from experiments.evaluation.stages import Draft, Metric, Score, prepare, score
from experiments.scbench.options import Conversing
from experiments.scbench.pieces import Mode
from experiments.scbench.predict import predict
from experiments.scbench.reader import Reader
from models import Model

# Options that may change when a run goes on: what is there stays as it is.
_FREE = ("output", "limit", "modes", "methods", "batch_size")

# Of each method and mode.
Scores = dict[str, dict[Mode, list[Score]]]


def reader_of(
    config: Conversing, method: Method, attentions: Attentions, model: Model, programs: Programs
) -> Reader:
    """Returns what reads conversations by a method."""
    return Reader(
        model=model,
        attention=functools.partial(attentions.at, method, asks=True),
        compression=method.compression(model.config.num_layers),
        chat=config.chat,
        chunk_size=config.model.chunk_size,
        programs=programs,
    )


def converse(
    config: Conversing,
    *,
    settings: dict[str, Any],
    drafts: Callable[[Model], Sequence[Draft]],
    metric: Metric,
) -> Scores:
    """Runs the stages for each method and mode, and writes the record.

    Args:
        config: the options.
        settings: what else decides the samples, for example a digest of a text.
        drafts: the samples of a model before they are made; of each conversation its context and
            then its turns.
        metric: how right an answer is.

    Raises:
        UserError: an input cannot be used, or the folder holds another run.
    """
    folder, methods = config.folder, parse_methods(config.methods)
    for method in methods:
        if method.whole:
            raise UserError(
                f"--methods: {method.label} cannot read questions onto a context; leave it out"
            )
    model, methods, attentions, folders, wanted = begin(
        config, methods, free=_FREE, settings=settings, drafts=drafts
    )
    samples = prepare(folder, wanted)
    size = 1 + config.turns
    conversations = [samples[at : at + size] for at in range(0, len(samples), size)]
    turns = [turn for _, *asked in conversations for turn in asked]
    scores: Scores = {}
    programs = Programs()
    for method in methods:
        calibrations = attentions.calibrations(method, (one.length for one in turns), asks=True)
        about = claim_calibrations(folders[method.label], calibrations)
        reader = reader_of(config, method, attentions, model, programs)
        found: dict[Mode, list[Score]] = {}
        for mode in config.modes:
            place = folders[method.label] / mode
            answers = predict(place, conversations, reader, mode=mode, name=method.label)
            found[mode] = score(place, turns, answers, metric)
        result = {
            mode: {
                "means": [mean._asdict() for mean in means(of_mode)],
                "scores": {one.name: one.score for one in of_mode},
            }
            for mode, of_mode in found.items()
        }
        write_record(
            folder, method, kind=config.kind, config=config, result={"modes": result, **about}
        )
        scores[method.label] = found
    return scores
