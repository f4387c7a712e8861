"""Options of conversations. Field docstrings are the `--help` text."""

import dataclasses

from experiments.common.errors import UserError
from experiments.common.options import all_different, at_least
from experiments.evaluation.options import Evaluation
from experiments.scbench.pieces import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversing(Evaluation):
    """A command that asks several questions about one context."""

    modes: tuple[Mode, ...] = ("multi_turn", "shared_context")
    """multi_turn: each question follows the right answer to the one before; shared_context: the
    context is read alone, and each question follows it."""
    turns: int = 5
    """Questions about each context."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, or options that contradict each other."""
        super().__post_init__()
        at_least("turns", self.turns, 1)
        all_different("modes", self.modes)
        if self.batch_size != 1:
            raise UserError(
                f"conversations are read one at a time; leave out --batch-size {self.batch_size}"
            )
