"""`minference latency --layer`: one attention layer at several lengths, beside its peers."""

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import minference_jax as mj
from experiments.common.errors import UserError, check_writable
from experiments.common.measure import stage
from experiments.common.options import AttentionOptions, OptionalPath
from experiments.common.record import append_record
from experiments.latency.inputs import structured_qkv
from experiments.latency.layer import LayerTimes, measure_layer
from experiments.latency.plot import latency_picture
from models.common.config import DecoderConfig
from models.llama import config as llama

LayerName = Literal["llama3-8b", "qwen2.5-7b", "smollm2-135m"]
_LAYERS: dict[LayerName, Callable[[], DecoderConfig]] = {
    "llama3-8b": llama.llama3_8b,
    "qwen2.5-7b": lambda: llama.qwen2_5("7B"),
    "smollm2-135m": llama.smollm2_135m,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Time one attention layer: index, attention, dense, and other people's dense attention.

    Queries and keys are synthetic, with the columns and slashes of real heads. The table gives
    medians of warm calls; the record holds every call.
    """

    layer: LayerName = "llama3-8b"
    """Shape of the layer."""
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens."""
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    """Pattern of the heads."""
    pattern_layer: int = 0
    """With --patterns: the layer of the file whose heads are taken."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of queries, keys and values."""
    repeats: int = 10
    """Timed calls of each part; one that takes over a second is timed fewer times."""
    seed: int = 0
    """Seed of the inputs."""
    plot: OptionalPath = None
    """Folder for the picture."""
    record: OptionalPath = None
    """JSONL file that a record is appended to."""

    def __post_init__(self) -> None:
        """Raises UserError for lengths or repeats out of range, and for dense attention."""
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"--lengths must name lengths of at least 1, got {self.lengths}")
        if self.repeats < 1:
            raise UserError(f"--repeats must be at least 1, got {self.repeats}")
        if self.attention.attention == "dense":
            raise UserError("dense attention is always timed; choose a sparse --attention")

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        if self.plot is not None:
            check_writable(self.plot, folder=True)
        if self.record is not None:
            check_writable(self.record, folder=False)
        config = _LAYERS[self.layer]()
        attention = self._attention(config.num_heads)
        results = [self._measure(attention, config, length, progress) for length in self.lengths]
        console.print(_table(results))
        if self.plot is not None:
            path = latency_picture(
                results,
                title=textwrap.fill(f"one layer of {self.layer}, {self.attention.describe()}", 64),
                path=self.plot / "latency.png",
            )
            console.print(f"picture: {path}")
        if self.record is not None:
            append_record(
                self.record,
                kind="latency",
                argv=sys.argv,
                config=self,
                result={"lengths": [dataclasses.asdict(times) for times in results]},
            )
            console.print(f"record: {self.record}")

    def _attention(self, num_heads: int) -> mj.SparseAttention:
        if self.attention.patterns is None:
            pattern = self.attention.uniform_pattern()
            patterns = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=num_heads)
            return mj.SparseAttention(patterns).layer(0)
        patterns = self.attention.load_patterns()
        if patterns.num_heads != num_heads or not 0 <= self.pattern_layer < patterns.num_layers:
            raise UserError(
                f"{self.attention.patterns} describes {patterns.num_layers} layers of "
                f"{patterns.num_heads} heads; layer {self.pattern_layer} of {num_heads} heads "
                "was asked for"
            )
        return mj.SparseAttention(patterns).layer(self.pattern_layer)

    def _measure(
        self, attention: mj.SparseAttention, config: DecoderConfig, length: int, console: Console
    ) -> LayerTimes:
        with stage(console, f"{length:,} tokens"):
            q, k, v = structured_qkv(
                length=length,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                dtype=jnp.dtype(self.dtype),
                seed=self.seed,
            )
            return measure_layer(attention, q, k, v, repeats=self.repeats)


def _table(results: list[LayerTimes]) -> Table:
    table = Table(title="milliseconds; peer / sparse: the fastest dense peer over our sparse layer")
    peers = [name for name in results[0].peers if any("seconds" in t.peers[name] for t in results)]
    own = ("tokens", "visited", "sparse", "index", "attention", "dense")
    for name in (*own, *peers, "peer / sparse"):
        table.add_column(name, justify="right")
    for times in results:
        best = times.best_peer()
        table.add_row(
            f"{times.length:,}",
            f"{times.density:.1%}",
            *(f"{1e3 * s:.2f}" for s in (times.sparse, times.index, times.attention, times.dense)),
            *(_milliseconds(times.peers[name]) for name in peers),
            "" if best is None else f"{best[1] / times.sparse:.2f}",
        )
    return table


def _milliseconds(peer: dict[str, Any]) -> str:
    return f"{1e3 * np.median(peer['seconds']):.2f}" if "seconds" in peer else "-"
