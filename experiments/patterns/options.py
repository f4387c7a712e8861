"""Options that the analyses share. Field docstrings are the `--help` text."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments.common.errors import UserError, check_writable
from experiments.common.measure import peak_memory
from experiments.common.options import LoadOptions, at_least
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.search.calibrate import encode_prompts
from experiments.search.options import CalibrationOptions
from models import Model

_BOOK = CalibrationOptions(tasks=("book",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Where an analysis leaves its results."""

    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/patterns")
    """Folder for pictures and a record."""

    def check_writable(self) -> None:
        """Raises UserError if results could not be written; before a model is loaded for them."""
        check_writable(self.output, folder=True)

    def keep(self, console: Console, kind: str, result: dict[str, Any], *pictures: Path) -> None:
        """Appends the figures to the record, and tells where everything is."""
        record = self.output / "record.jsonl"
        append_record(record, kind=f"patterns {kind}", argv=sys.argv, config=self, result=result)
        for path in pictures:
            console.print(f"picture: {path}", soft_wrap=True)
        console.print(f"record: {record}", soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptAnalysis(Analysis):
    """An analysis of what a model attends to in prompts, which it reads with dense attention."""

    model: LoadOptions
    calibration: CalibrationOptions = dataclasses.field(default=_BOOK)
    layers: tuple[int, ...] = ()
    """Layers looked at; all if not given."""
    rows: int = 256
    """Queries looked at, spread evenly, where rows are looked at one by one."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least("rows", self.rows, 1)
        for layer in self.layers:
            at_least("layers", layer, 0)

    def open(
        self, model: Model | None = None, *, prompts: int = 1
    ) -> tuple[Model, list[list[int]]]:
        """Loads the model and encodes the prompts.

        Args:
            model: the model if it was loaded before.
            prompts: how many there must be.

        Raises:
            UserError: an input cannot be used; as far as possible before the model is loaded.
        """
        if (wanted := len(self.calibration.wanted)) != prompts:
            raise UserError(f"--tasks and --prompts must make {prompts} prompts here, got {wanted}")
        _ = self.calibration.book
        self.check_writable()
        model = load(self.model, Console(stderr=True)) if model is None else model
        self.chosen_layers(model)
        return model, encode_prompts(model, self.calibration)

    def chosen_layers(self, model: Model) -> Sequence[int]:
        """The layers looked at, ascending; raises UserError for one that the model lacks."""
        number = model.config.num_layers
        if any(layer >= number for layer in self.layers):
            raise UserError(
                f"--layers must be below {number}, the model's layers; got {max(self.layers)}"
            )
        return sorted(set(self.layers)) or range(number)

    def about(self, tokens: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[str, Any]:
        """What was read, for the record."""
        return {
            "length": min(map(len, tokens)),
            "layers": list(layers),
            "peak_memory_bytes": peak_memory(),
        }
