"""`minference generate`: read a prompt with sparse attention and answer it."""

import dataclasses

from experiments.common.command import PromptCommand, run_prompt
from experiments.common.kv_cache import CacheOptions
from experiments.common.options import SamplingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(PromptCommand):
    """Read a prompt with sparse attention and generate text after it.

    New tokens attend densely to the keys and values that are kept.
    """

    cache: CacheOptions = dataclasses.field(default_factory=CacheOptions)
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        run_prompt(self, kind="generate", sampling=self.sampling, cache=self.cache)
