"""`minference patterns`: one sub-command for each analysis."""

import dataclasses
from typing import Annotated

import tyro

from experiments.patterns.all_command import All
from experiments.patterns.coverage_command import Coverage
from experiments.patterns.decoding_command import Decoding
from experiments.patterns.distribution import Distribution
from experiments.patterns.maps_command import Maps
from experiments.patterns.recall_command import Recall
from experiments.patterns.sparsity_command import Sparsity

Analyses = (
    Annotated[All, tyro.conf.subcommand("all", prefix_name=False)]
    | Annotated[Distribution, tyro.conf.subcommand("distribution", prefix_name=False)]
    | Annotated[Coverage, tyro.conf.subcommand("coverage", prefix_name=False)]
    | Annotated[Recall, tyro.conf.subcommand("recall", prefix_name=False)]
    | Annotated[Maps, tyro.conf.subcommand("maps", prefix_name=False)]
    | Annotated[Sparsity, tyro.conf.subcommand("sparsity", prefix_name=False)]
    | Annotated[Decoding, tyro.conf.subcommand("decoding", prefix_name=False)]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns:
    """Analyses of attention: how sparse it is, where, and whether that is known beforehand."""

    analysis: Analyses

    def run(self) -> None:
        """Runs the analysis; raises UserError if an input cannot be used."""
        self.analysis.run()
