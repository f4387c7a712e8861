"""Tables of a run, for people; the same figures for a record."""

import dataclasses
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from experiments.common.measure import Agreement
from experiments.common.session import Generation, PrefillRun

_LAYERS_PER_ROW = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that one attention gave on a prompt.

    Attributes:
        name: short name of the attention, the column's title.
        description: the attention with its budgets.
        prefill: the prompt's run.
        next_token: text of the likeliest next token.
        generation: what was generated, if anything.
        agreement: next-token distribution against dense, if that was run.
    """

    name: str
    description: str
    prefill: PrefillRun
    next_token: str
    generation: Generation | None = None
    agreement: Agreement | None = None

    def figures(self) -> dict[str, Any]:
        """Returns the figures for a record."""
        run, generation = self.prefill, self.generation
        return {
            "name": self.name,
            "description": self.description,
            "next_token": self.next_token,
            "prefill_seconds": run.seconds,
            "prefill_compile_seconds": run.compile_seconds,
            "peak_memory_bytes": run.peak_memory,
            "program_bytes": run.program_bytes,
            "cache_bytes": run.cache_bytes,
            "density": np.round(run.density, 5),
            "generation": None if generation is None else dataclasses.asdict(generation),
            "agreement": None if self.agreement is None else dataclasses.asdict(self.agreement),
        }


def show(console: Console, *, prompt_tokens: int, outcomes: list[Outcome]) -> None:
    """Prints the table of the runs, the density of every layer, and the answers."""
    _heading(console, f"attention: {outcomes[0].description}")
    console.print(_table(prompt_tokens, outcomes))
    for outcome in outcomes:
        if outcome.name != "dense":
            _heading(
                console, f"{outcome.name}: % of causal pairs visited, by layer (mean of heads)"
            )
            console.print(_density_table(outcome))
    answers = [_answer(outcome) for outcome in outcomes if outcome.generation is not None]
    console.print(Group(*answers))


def _heading(console: Console, text: str) -> None:
    console.print(text, style="bold", highlight=False, soft_wrap=True)


def _table(prompt_tokens: int, outcomes: list[Outcome]) -> Table:
    table = Table()
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.name, justify="right")
    for label, values in _rows(prompt_tokens, outcomes):
        if any(values):
            table.add_row(label, *values)
    return table


def _rows(prompt_tokens: int, outcomes: list[Outcome]) -> list[tuple[str, list[str]]]:
    runs = [outcome.prefill for outcome in outcomes]
    texts = [outcome.generation for outcome in outcomes]
    compared = [outcome.agreement for outcome in outcomes]
    return [
        ("prompt tokens", [f"{prompt_tokens:,}" for _ in runs]),
        ("time to first token", [f"{run.median_seconds:.2f} s" for run in runs]),
        ("  compilation before it", [f"{run.compile_seconds:.1f} s" for run in runs]),
        ("causal pairs visited", [f"{run.density.mean():.1%}" for run in runs]),
        ("peak memory so far", [f"{run.peak_memory / 2**30:.2f} GiB" for run in runs]),
        ("keys and values kept", [f"{run.cache_bytes / 2**20:.1f} MiB" for run in runs]),
        ("likeliest next token", [repr(outcome.next_token) for outcome in outcomes]),
        ("  same as dense", ["" if a is None else _yes(a.top1_equal) for a in compared]),
        ("  KL from dense", ["" if a is None else f"{a.kl:.2g} nats" for a in compared]),
        ("generated tokens", ["" if g is None else f"{len(g.tokens)}" for g in texts]),
        ("  time per token", ["" if g is None else _per_token(g) for g in texts]),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _per_token(generation: Generation) -> str:
    steps = len(generation.tokens) - 1
    return f"{1000 * generation.seconds / steps:.0f} ms" if steps else "-"


def _density_table(outcome: Outcome) -> Table:
    density = outcome.prefill.density
    table = Table()
    table.add_column("layer")
    columns = min(_LAYERS_PER_ROW, len(density))
    for number in range(columns):
        table.add_column(f"+{number}", justify="right")
    for first in range(0, len(density), columns):
        row = density[first : first + columns].mean(axis=1)
        table.add_row(str(first), *(f"{100 * value:.0f}" for value in row))
    return table


def _answer(outcome: Outcome) -> Panel:
    text = outcome.generation.text if outcome.generation else ""
    return Panel(Text(text), title=f"answer, {outcome.name}", title_align="left")
