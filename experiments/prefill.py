"""`minference prefill`: read a prompt and report time, density and the next token."""

import dataclasses

from experiments.common.command import PromptCommand, run_prompt, show_plan
from experiments.common.kv_cache import PrefillCacheOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(PromptCommand):
    """Read a prompt: time to first token, density of every layer, agreement with dense."""

    cache: PrefillCacheOptions = dataclasses.field(default_factory=PrefillCacheOptions)
    estimate_memory: bool = False
    """Say how much memory the prompt would need, part by part, and stop; nothing is loaded."""

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        if self.estimate_memory:
            show_plan(self, cache=self.cache)
        else:
            run_prompt(self, kind="prefill", sampling=None, cache=self.cache)
