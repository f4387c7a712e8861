"""Options that evaluations share. Field docstrings are the `--help` text."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments.common import kv_cache
from experiments.common.methods import usage
from experiments.common.options import ModelOptions, OptionalInt, OptionalPath, at_least

DEFAULTS = ("dense", "minference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A command that asks a model questions."""

    model: ModelOptions
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=f"Methods that read the prompts: {usage()}. A suffix keeps a part of the prompt "
            f"for decoding, as in minference+snapkv:1024: {kv_cache.USAGE}. More can be added to a "
            "run later.",
        ),
    ] = DEFAULTS
    batch_size: int = 1
    """Prompts of a length that are read and answered together; answers do not depend on it."""
    output: OptionalPath = None
    """Folder of the run, with samples, predictions and scores of each method, a record and pictures
    (outputs/ and the command's name). A run that was stopped goes on where it was."""
    limit: OptionalInt = None
    """Samples of each task and length at most; all if not given."""
    seed: int = 0
    """Seed of the samples."""
    chat: bool = True
    """Put prompts into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError for a number below one."""
        at_least("limit", self.limit, 1)
        at_least("batch_size", self.batch_size, 1)

    @property
    def kind(self) -> str:
        """The command's name."""
        return type(self).__name__.lower()

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path("outputs") / self.kind if self.output is None else self.output
