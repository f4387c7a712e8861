"""`minference prefill`: read a prompt and report time, density and the next token."""

import dataclasses

from experiments.common.command import PromptCommand, run_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(PromptCommand):
    """Read a prompt: time to first token, density of every layer, agreement with dense."""

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        run_prompt(self, kind="prefill", sampling=None)
