"""A whole run of conversations: the stages in their order, and its record."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from experiments.common.errors import check_writable, reported_as_user_error
from experiments.common.fingerprint import fingerprint
from experiments.common.session import load
from experiments.evaluation.folder import claim, settings_of, write_record
from experiments.evaluation.run import means
from experiments.evaluation.stages import Draft, Metric, Score, limited, prepare, score
from experiments.scbench.options import Conversing
from experiments.scbench.pieces import Mode
from experiments.scbench.predict import Reader, predict
from models import Model
from models.common.checks import check_context

# Options that may change when a run goes on: what is there stays as it is.
_FREE = ("output", "limit", "modes")

# Of each method and mode.
Scores = dict[str, dict[Mode, list[Score]]]


def readers_of(config: Conversing, model: Model) -> dict[str, Reader]:
    """Returns each method by its label; the one place that knows where methods come from."""
    sizes = model.config
    kept = "" if config.cache.kv_cache is None else f", {config.cache.kv_cache}"
    reader = Reader(
        model=model,
        attention=config.attention.build(num_layers=sizes.num_layers, num_heads=sizes.num_heads),
        compression=config.cache.build(num_layers=sizes.num_layers),
        chat=config.chat,
        chunk_size=config.model.chunk_size,
    )
    return {config.attention.describe() + kept: reader}


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
    folder = config.folder
    check_writable(folder, folder=True)
    config.attention.check_readable()
    claim(folder, {"kind": config.kind, **settings_of(config, free=_FREE), **settings})
    model = load(config.model, Console(stderr=True))
    readers = readers_of(config, model)
    claim(folder, {"model_sha256": fingerprint(model)})
    wanted = limited(drafts(model), config.limit)
    with reported_as_user_error(ValueError):
        check_context(max(draft.length for draft in wanted), model.config)
    samples = prepare(folder, wanted)
    size = 1 + config.turns
    conversations = [samples[at : at + size] for at in range(0, len(samples), size)]
    turns = [turn for _, *asked in conversations for turn in asked]
    scores: Scores = {}
    for label, reader in readers.items():
        for mode in config.modes:
            place = folder / mode
            answers = predict(place, conversations, reader, mode=mode)
            scores.setdefault(label, {})[mode] = score(place, turns, answers, metric)
    result = {
        "methods": {
            label: {
                mode: {
                    "means": [mean._asdict() for mean in means(found)],
                    "scores": {one.name: one.score for one in found},
                }
                for mode, found in modes.items()
            }
            for label, modes in scores.items()
        }
    }
    write_record(folder, kind=config.kind, config=config, result=result)
    return scores
