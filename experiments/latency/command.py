"""`minference latency`: attention beside its peers, at several lengths, in one run."""

import dataclasses
import sys
from typing import Any, Literal

from rich.console import Console

from experiments.common.attention import AttentionOptions, read_attention
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.options import OptionalPath
from experiments.common.record import append_record, environment, read_records
from experiments.common.shapes import SHAPES, ShapeName
from experiments.latency.layer import LayerCase, table_layers
from experiments.latency.lines import real_lines
from experiments.latency.peers import jax_dense_name
from experiments.latency.plot import split_picture, times_picture
from experiments.latency.rows import Figures, Point, Rows, read_rows
from experiments.latency.run import Suite, measure_length
from experiments.latency.table import aims_markdown, rows_markdown
from minference_jax.files import attention_size
from pallas_kernels.bench import Workload, workloads
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.measure import WrongResult
from pallas_kernels.common.environment import not_hopper

_LENGTHS = {
    "layer": (8192, 32768, 131072),
    # What most lines of the table of aims need comes first.
    "table": (131072, 1048576, 32768, 8192, 524288),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Time attention: ours, its parts, and dense attention by others, in one run.

    `--suite layer` times one layer with the attention asked for; `--suite table` the patterns of
    the shipped configurations, as lists given to the kernel and as layers that estimate them, and
    judges them by the project's aims. Sampled rows are checked against float32 first. Times are
    medians of warm calls. Queries and keys are synthetic; those of layers have the columns and
    slashes of real heads.
    """

    suite: Literal["layer", "table"] = "layer"
    """One layer with the attention below, or the table of patterns."""
    layer: ShapeName = "llama3-8b"
    """Shape of the layer."""
    lengths: tuple[int, ...] = ()
    """Tokens; if not given 8192, 32768, 131072, and for the table also 524288 and 1048576."""
    only: tuple[str, ...] = ()
    """With --suite table: only what has one of these words in its name."""
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    """With --suite layer: pattern of the heads."""
    pattern_layer: int = 0
    """With --patterns: the layer of the file whose heads are taken."""
    block_kv: tuple[int, ...] = (96,)
    """With --suite table: keys of a tile of lines given to the kernel."""
    lines: OptionalPath = None
    """With --suite table: line sets of real heads (an .npz file of `minference visited`)."""
    longest_peer: int = 1048576
    """Dense attention by others is timed up to this length (20 s at a million tokens)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of queries, keys and values."""
    seed: int = 0
    """Seed of the inputs."""
    record: OptionalPath = None
    """JSONL file: each row is appended as soon as it is measured, and rows it has are skipped."""
    render: bool = False
    """Measure nothing: show what the record holds."""
    visited: OptionalPath = None
    """With --suite table: record of `minference visited`, for its line of the table."""
    plot: OptionalPath = None
    """Folder for the pictures, and for the table."""

    def __post_init__(self) -> None:
        """Raises UserError for lengths out of range, dense attention, and options that clash."""
        if self.lengths and min(self.lengths) < 1:
            raise UserError(f"--lengths must name lengths of at least 1, got {self.lengths}")
        if self.attention.attention == "dense":
            raise UserError("dense attention is always timed; choose a sparse --attention")
        if self.suite == "layer" and (self.only or self.lines or self.visited):
            raise UserError(
                "--only, --lines and --visited belong to --suite table, got --suite layer"
            )
        if self.render and self.record is None:
            raise UserError("--render shows a record; name its file with --record")

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        if self.plot is not None:
            check_writable(self.plot, folder=True)
        if self.record is not None:
            check_writable(self.record, folder=False)
        rows = self._read(None if self.render else environment(sys.argv))
        wrong = [] if self.render else self._measure(rows, progress, console)
        if not rows.figures and not wrong:
            raise UserError(f"{self.record} holds no rows; leave --render out to measure")
        if rows.figures:
            self._show(rows, console)
        if wrong:
            raise WrongResult("; ".join(wrong))

    def _read(self, like: dict[str, Any] | None) -> Rows:
        if self.record is None:
            return Rows(figures={}, environments=[])
        with reported_as_user_error(OSError, ValueError):
            return read_rows(self.record, like=like)

    def _measure(self, rows: Rows, progress: Console, console: Console) -> list[str]:
        """Measures what `rows` lacks, and puts it there and into the record.

        Returns:
            What gave a wrong result, and so no row.
        """
        if rows.figures:
            progress.print(f"{len(rows.figures)} rows of this revision are in {self.record}")
        rows.environments.append(environment(sys.argv))
        wrong = []
        for length in self.lengths or _LENGTHS[self.suite]:
            suite = self._suite(length)
            dense = rows.figures.get(suite.point("peer", jax_dense_name(), length))
            for point, figures in measure_length(suite, length, set(rows.figures), dense, progress):
                console.print(_line(point, figures), highlight=False, soft_wrap=True)
                if "wrong" in figures:
                    wrong.append(f"{point.name}, {point.length} tokens: {figures['wrong']}")
                if "ms" in figures:
                    rows.figures[point] = figures
                    if self.record is not None:
                        append_record(
                            self.record, kind="latency", argv=sys.argv, config=point, result=figures
                        )
        return wrong

    def _suite(self, length: int) -> Suite:
        """What is measured at one length."""
        config = SHAPES[self.layer]()
        # Where Hopper's kernel runs, nothing slower may stand in for it.
        hopper = not not_hopper() and self.dtype != "float32"
        implementation: Implementation | None = "mosaic_gpu" if hopper else None
        if self.suite == "layer":
            given: list[Workload] = [w for w in workloads([], []) if w.name == "dense"]
            layers = [self._own_layer(config.num_heads, implementation)]
        else:
            given = [*workloads(["contiguous", "clustered", "scattered"], list(self.block_kv))]
            layers = [*table_layers(config.num_heads, implementation)]
            if self.lines is not None:
                with reported_as_user_error(OSError, ValueError):
                    given += real_lines(self.lines, length, self.block_kv)
        wanted = lambda name: not self.only or any(word in name for word in self.only)
        return Suite(
            workloads=tuple(w for w in given if wanted(w.name)),
            layers=tuple(case for case in layers if wanted(case.name)),
            layer=self.layer,
            config=config,
            dtype=self.dtype,
            seed=self.seed,
            implementation=implementation,
            longest_peer=self.longest_peer,
        )

    def _own_layer(self, num_heads: int, implementation: Implementation | None) -> LayerCase:
        name = self.attention.describe()
        number = 0
        if self.attention.patterns is None:
            attention = self.attention.build(num_layers=1, num_heads=num_heads)
        else:
            attention, number = read_attention(self.attention.patterns), self.pattern_layer
            name += f", layer {number}"
            layers, heads = attention_size(attention)
            if heads != num_heads or not 0 <= number < layers:
                raise UserError(
                    f"{self.attention.patterns} describes {layers} layers of {heads} heads; layer "
                    f"{number} of {num_heads} heads was asked for"
                )
        attention = dataclasses.replace(attention, implementation=implementation).layer(number)
        return LayerCase(name=name, attention=attention, split=True)

    def _show(self, rows: Rows, console: Console) -> None:
        text = rows_markdown(rows)
        if self.suite == "table":
            visited = []
            if self.visited is not None:
                with reported_as_user_error(OSError, ValueError):
                    visited = [r["result"] for r in read_records(self.visited, kind="visited")]
            text = f"{aims_markdown(rows, visited)}\n\n{text}"
        print(text)
        if self.plot is not None:
            (self.plot / "latency.md").write_text(text + "\n", encoding="utf-8")
            console.print(f"table: {self.plot / 'latency.md'}")
            for path in (
                times_picture(rows, self.plot / "latency.png"),
                split_picture(rows, self.plot / "latency-split.png"),
            ):
                if path is not None:
                    console.print(f"picture: {path}")
        if self.record is not None:
            console.print(f"record: {self.record}")


def _line(point: Point, figures: Figures) -> str:
    text = f"{point.length:>9,} {point.level:<6} {point.name:<34}"
    if "ms" not in figures:
        return f"{text} {'; '.join(map(str, figures.values()))}"
    text += f" {figures['ms']:>10.3f} ms {figures['tflops']:>5.0f} TFLOP/s"
    if "speedup" in figures:
        text += f" ({figures['rate_ratio']:.2f} of dense), {figures['speedup']:.2f} x faster"
    if "density" in figures:
        text += f", density {figures['density']:.4f}"
    return text
