"""Options that evaluations share. Field docstrings are the `--help` text."""

import dataclasses
from pathlib import Path

from experiments.common.attention import AttentionOptions
from experiments.common.options import ModelOptions, OptionalInt, OptionalPath, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A command that asks a model questions."""

    model: ModelOptions
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    output: OptionalPath = None
    """Folder of the run, with samples, predictions, scores, a record and pictures (outputs/ and
    the command's name). A run that was stopped goes on where it was."""
    limit: OptionalInt = None
    """Samples of each task and length at most; all if not given."""
    seed: int = 0
    """Seed of the samples."""
    chat: bool = True
    """Put prompts into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError for a limit below one."""
        at_least("limit", self.limit, 1)

    @property
    def kind(self) -> str:
        """The command's name."""
        return type(self).__name__.lower()

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path("outputs") / self.kind if self.output is None else self.output
