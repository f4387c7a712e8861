"""The beginning of a run: what can be wrong is told before weights are read or files written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.common.calibration import Attentions
from experiments.common.errors import UserError, check_writable
from experiments.common.fingerprint import fingerprint
from experiments.common.methods import Method, for_model
from experiments.common.session import check_fits, load, sketch
from experiments.evaluation.folder import claim, claim_methods, read_lines, settings_of
from experiments.evaluation.options import Evaluation
from experiments.evaluation.stages import Draft, limited
from models import Model


class Begun(NamedTuple):
    """What a run works with.

    Attributes:
        model: with its weights.
        methods: as they run on it.
        attentions: of the methods.
        folders: of the methods, by label.
        drafts: the samples wanted.
    """

    model: Model
    methods: list[Method]
    attentions: Attentions
    folders: dict[str, Path]
    drafts: list[Draft]


def begin(
    config: Evaluation,
    methods: Sequence[Method],
    *,
    free: tuple[str, ...],
    settings: dict[str, Any],
    drafts: Callable[[Model], Sequence[Draft]],
) -> Begun:
    """Checks a run, claims its folder and loads its model.

    Args:
        config: the options.
        methods: those of the command line.
        free: names of options that may change when a run goes on.
        settings: what else decides the samples, for example a digest of a text.
        drafts: the samples of a model before they are made; its weights do not matter.

    Raises:
        UserError: an input cannot be used, or the folder holds another run.
    """
    folder = config.folder
    check_chunks(methods, config.model.chunk_size)
    wanted = _checked(config, methods, drafts)
    check_writable(folder, folder=True)
    claim(folder, {"kind": config.kind, **settings_of(config, free=free), **settings})
    folders = claim_methods(folder, methods)
    model = load(config.model, progress := Console(stderr=True))
    claim(folder, {"model_sha256": fingerprint(model)})
    found = for_model(methods, model, progress)
    claim_methods(folder, found)
    return Begun(model, found, Attentions(found, model, chat=config.chat), folders, wanted)


def check_chunks(methods: Sequence[Method], chunk_size: int | None) -> None:
    """Raises UserError if a method that needs prompts whole is to read them in chunks."""
    if chunk_size is None:
        return
    for method in methods:
        needs = f"--methods: {method.label} needs the whole prompt at once; leave out --chunk-size"
        if method.whole or method.calibrated is not None:
            raise UserError(needs)
        if method.kept is not None:
            raise UserError(f"{needs} or +{method.kept.label}")


def _checked(
    config: Evaluation, methods: Sequence[Method], drafts: Callable[[Model], Sequence[Draft]]
) -> list[Draft]:
    """The samples wanted; raises UserError if they or the methods do not fit model and texts."""
    model = sketch(config.model)
    Attentions(methods, model, chat=config.chat)
    wanted = limited(drafts(model), config.limit)
    longest = max(draft.length for draft in wanted)
    check_fits(longest, model)
    known = {line["name"] for line in read_lines(config.folder / "samples.jsonl")}
    if any(draft.name not in known for draft in wanted):
        # A text too short is too short for the longest sample.
        for draft in {one.task: one for one in wanted if one.length == longest}.values():
            draft.make()
    return wanted
