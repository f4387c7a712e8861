"""`minference visited`: keys that real heads' lines make attention visit, beside the original."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import minference_jax as mj
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.measure import stage
from experiments.common.options import ModelOptions, OptionalPath
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.latency.lines import save_lines
from experiments.visited.count import figures, read_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visited:
    """Count the keys that a model's vertical-slash heads visit on a text.

    The lines are chosen as in attention (dense attention runs meanwhile); their tiles of `block_kv`
    keys, staggered over 128 query rows, are compared with the original's execution of the same
    lines: 64 query rows, ranges of 64 keys that start anywhere.
    """

    model: ModelOptions
    text: Path
    """A UTF-8 text file; its beginning is read."""
    lengths: tuple[int, ...] = (8192, 16384)
    """Tokens."""
    budgets: tuple[tuple[int, int], ...] = ((1000, 6096), (500, 700), (100, 800), (3500, 100))
    """Columns and diagonals of every head."""
    block_kv: tuple[int, ...] = (64, 96, 128)
    """Keys of a tile."""
    save_lines: OptionalPath = None
    """.npz file for the lines of 32 heads at the last length, for `minference latency --lines`."""
    record: OptionalPath = None
    """JSONL file that a record for each length is appended to."""

    def __post_init__(self) -> None:
        """Raises UserError for sizes out of range, or options that do not apply."""
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"--lengths must name lengths of at least 1, got {self.lengths}")
        if not self.block_kv or any(size < 8 or size % 8 for size in self.block_kv):
            raise UserError(f"--block-kv must name multiples of 8, got {self.block_kv}")
        if self.model.chunk_size is not None:
            raise UserError("--chunk-size does not apply: lines are chosen for the whole text")
        if not self.budgets:
            raise UserError("--budgets must name at least one pair, such as 1000 6096")
        self._patterns(1)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        for path in (self.save_lines, self.record):
            if path is not None:
                check_writable(path, folder=False)
        with reported_as_user_error(OSError, UnicodeDecodeError):
            text = self.text.read_text(encoding="utf-8")
        model = load(self.model, progress)
        tokens = np.asarray([model.tokenizer.encode(text)], np.int32)
        longest = max(self.lengths)
        if longest > min(tokens.shape[1], model.config.max_position):
            raise UserError(
                f"{longest} tokens were asked for, but {self.text} has {tokens.shape[1]} and the "
                f"model's context is {model.config.max_position}; choose other --lengths"
            )
        patterns = self._patterns(model.config.num_heads)
        digest = hashlib.sha256(text.encode()).hexdigest()
        for length in self.lengths:
            with stage(progress, f"reading {length:,} tokens, counting"):
                counted = read_lines(model, tokens[:, :length], patterns, self.block_kv)
                budgets = {
                    name: figures(counted, number, length)
                    for number, name in enumerate(self._names())
                }
            console.print(_table(length, budgets))
            if self.record is not None:
                result = {"length": length, "text_sha256": digest, "budgets": budgets}
                append_record(
                    self.record, kind="visited", argv=sys.argv, config=self, result=result
                )
            if self.save_lines is not None and length == self.lengths[-1]:
                self._save(self.save_lines, length, counted)

    def _save(self, path: Path, length: int, counted: dict[str, Any]) -> None:
        heads = lambda kind, number: counted[kind][:, number].reshape(-1, length)
        chosen = {
            f"lines-{name}": (heads("columns", number), heads("distances", number))
            for number, name in enumerate(self._names())
        }
        save_lines(path, length, chosen)

    def _names(self) -> list[str]:
        return [f"{columns}-{slashes}" for columns, slashes in self.budgets]

    def _patterns(self, num_heads: int) -> mj.HeadPatterns:
        with reported_as_user_error(ValueError, TypeError):
            return mj.HeadPatterns.from_grid(
                [
                    [mj.VerticalSlash(vertical_size=columns, slash_size=slashes)] * num_heads
                    for columns, slashes in self.budgets
                ]
            )


def _table(length: int, result: dict) -> Table:
    table = Table(title=f"{length:,} tokens: keys visited, % of the causal ones, mean of all heads")
    table.add_column("lines")
    table.add_column("original", justify="right")
    first = next(iter(result.values()))
    for block_kv in first["ours"]:
        table.add_column(f"kv {block_kv}", justify="right")
        table.add_column("ratio", justify="right")
    for name, row in result.items():
        cells = [f"{100 * row['original']['visited']:.1f}"]
        for ours in row["ours"].values():
            cells += [f"{100 * ours['visited']:.1f}", f"{ours['visited_ratio']:.3f}"]
        table.add_row(name.replace("-", ", "), *cells)
    return table
