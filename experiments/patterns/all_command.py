"""`minference patterns all`: the analyses of one model on one kind of prompt, loaded once."""

import dataclasses

from rich.console import Console

from experiments.common.attention import AttentionOptions
from experiments.common.errors import UserError
from experiments.common.session import load
from experiments.patterns.coverage_command import Coverage
from experiments.patterns.decoding_command import Decoding
from experiments.patterns.maps_command import Maps
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.recall_command import Recall
from experiments.patterns.sparsity_command import Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class All(PromptAnalysis):
    """Coverage, recall, sparsity and decoding with their own defaults, and maps of some heads.

    The model is loaded once; everything else is as if each had been run alone.
    """

    heads: tuple[tuple[int, int], ...] = ()
    """Layer and head of each head that is drawn; no maps if not given."""
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    """What the maps show as visited."""
    steps: int = 512
    """Tokens at the end of the text that count as decoded."""
    budgets: int = 8
    """Budgets of each pattern whose recall is taken."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        if len(self.calibration.wanted) != 1:
            raise UserError(
                f"one prompt is needed here, got {len(self.calibration.wanted)}; coverage takes 2"
            )
        self._analyses()

    def run(self) -> None:
        """Runs the analyses; raises UserError if an input cannot be used."""
        self.check_writable()
        self.attention.check_readable()
        _ = self.calibration.book
        model = load(self.model, Console(stderr=True))
        for analysis in self._analyses():
            analysis.run(model)

    def _analyses(self) -> list[Coverage | Recall | Sparsity | Decoding | Maps]:
        model, output, rows, layers = self.model, self.output, self.rows, self.layers
        one, two = self.calibration, dataclasses.replace(self.calibration, prompts=2)
        found: list[Coverage | Recall | Sparsity | Decoding | Maps] = [
            Coverage(model=model, output=output, rows=rows, layers=layers, calibration=two),
            Recall(model=model, output=output, rows=rows, layers=layers, calibration=one,
                   steps=self.budgets),
            Sparsity(model=model, output=output, rows=rows, layers=layers, calibration=one),
            Decoding(model=model, output=output, layers=layers, calibration=one, steps=self.steps),
        ]  # fmt: skip
        if self.heads:
            maps = Maps(model=model, output=output, calibration=one, heads=self.heads,
                        attention=self.attention)  # fmt: skip
            # First, because it knows which heads there are.
            found.insert(0, maps)
        return found
