"""Measuring at one length: programs compiled together, then peers, kernels and layers."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from experiments.common.measure import stage
from experiments.latency.inputs import structured_qkv
from experiments.latency.layer import LayerCase, add_layer, index_shapes, measure_layer
from experiments.latency.peers import add_jax_dense, jax_dense_name, other_peers
from experiments.latency.rows import Figures, Level, Point
from models.common.config import DecoderConfig
from pallas_kernels import BlockSparseIndex
from pallas_kernels.bench import Workload
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.measure import (
    WrongResult,
    add_kernel,
    causal_flops,
    measure_kernel,
    random_qkv,
    share_shapes,
)
from pallas_kernels.common.timing import Programs, time_calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured at every length.

    Attributes:
        workloads: lists that attention runs over.
        layers: layers with their index.
        layer: name of the layer whose shape is taken.
        config: that layer's model.
        dtype: of queries, keys and values.
        seed: of the layers' inputs.
        implementation: of attention; None chooses, which may be one that is not meant.
        longest_peer: greatest length at which dense peers are timed.
    """

    workloads: tuple[Workload, ...]
    layers: tuple[LayerCase, ...]
    layer: str
    config: DecoderConfig
    dtype: str
    seed: int
    implementation: Implementation | None
    longest_peer: int

    def point(self, level: Level, name: str, length: int) -> Point:
        """What a record of this suite is called."""
        return Point(
            level=level, name=name, layer=self.layer, length=length, heads=self.config.num_heads,
            kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim, dtype=self.dtype,
            seed=self.seed,
        )  # fmt: skip


def measure_length(
    suite: Suite,
    length: int,
    done: Collection[Point],
    known: Figures | None,
    console: Console,
) -> Iterator[tuple[Point, Figures]]:
    """Yields each point's figures as soon as they are there.

    A figure `skipped` or `wrong` in place of times says why there are none. Rows also get
    `dense_ms` (JAX's own dense attention), `rate_ratio` (their TFLOP/s over its), `speedup` (its
    time over theirs), and whether it was timed in this run.

    Args:
        suite: what to measure.
        length: tokens.
        done: points that need no measuring.
        known: figures of JAX's dense attention from an earlier run, for where it is not timed now.
        console: where progress is shown.
    """
    point = functools.partial(suite.point, length=length)
    workloads = [w for w in suite.workloads if point("kernel", w.name) not in done]
    layers = [case for case in suite.layers if point("layer", case.name) not in done]
    peers = length <= suite.longest_peer
    if not workloads and not layers and (known is not None or not peers):
        return
    key = jax.random.key(suite.seed)
    with stage(console, f"{length:,} tokens: compiling"):
        indices = [workload.build(suite.config.num_heads, length) for workload in workloads]
        ready = _compile(suite, length, indices, layers, key, peers=peers)
    programs, indices = ready.programs, ready.indices

    q, k, v = programs.get("random inputs", key)(key)
    peer = known
    if ready.no_dense is None:
        seconds = time_calls(programs.get(jax_dense_name(), q, k, v), q, k, v)
        peer = _dense_figures({"seconds": seconds}, q)
        yield point("peer", jax_dense_name()), peer
    else:
        yield point("peer", jax_dense_name()), {"skipped": ready.no_dense}
    against = functools.partial(_against, peer=peer, same_run=ready.no_dense is None)
    for name, times in other_peers(q, k, v).items() if peers else ():
        yield point("peer", name), against(_dense_figures(times, q))
    for workload, index in zip(workloads, indices, strict=True):
        figures = _guarded(measure_kernel, programs, q, k, v, index)
        if workload.name == "dense" and "ms" in figures:
            figures["tflops"] = causal_flops(q) / figures["ms"] / 1e9
        yield point("kernel", workload.name), against(figures)
    if not layers:
        return
    del q, k, v
    q, k, v = programs.get("structured inputs", key)(key)
    for case in layers:
        figures = _guarded(measure_layer, programs, q, k, v, case)
        yield point("layer", case.name), against(figures)


class _Ready(NamedTuple):
    programs: Programs
    indices: list[BlockSparseIndex]
    no_dense: str | None


def _compile(
    suite: Suite,
    length: int,
    indices: list[BlockSparseIndex],
    layers: list[LayerCase],
    key: Array,
    *,
    peers: bool,
) -> _Ready:
    """Compiles all programs of a length; the indices come back with shared shapes."""
    config = suite.config
    programs = Programs()
    random = lambda key: random_qkv(
        key, length, config.num_heads, config.num_kv_heads, config.head_dim, suite.dtype
    )
    q, k, v = jax.eval_shape(random, key)
    programs.add("random inputs", random, key)
    no_dense = add_jax_dense(programs, q, k, v) if peers else "not asked for"
    like = tuple(index_shapes(case, q, k, v) for case in layers)
    indices = share_shapes(indices, like=like)
    for case in layers:  # first, because they take longest to compile
        add_layer(programs, q, k, v, case)
    for index in indices:
        add_kernel(programs, q, k, v, index, suite.implementation)
    if layers:
        structured = functools.partial(
            structured_qkv, length=length, num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            dtype=jnp.dtype(suite.dtype),
        )  # fmt: skip
        programs.add("structured inputs", structured, key)
    programs.compile()
    return _Ready(programs, indices, no_dense)


def _dense_figures(times: Figures, q: Array) -> Figures:
    """The figures of a dense peer from its `seconds`; others stay as they are."""
    if "seconds" not in times:
        return times
    seconds = times["seconds"]
    median = float(np.median(seconds))
    return {name: value for name, value in times.items() if name != "seconds"} | {
        "ms": median * 1e3,
        "runs_ms": [1e3 * s for s in seconds],
        "tflops": causal_flops(q) / median / 1e12,
    }


def _guarded(measure: Callable[..., Figures], *arguments: Any) -> Figures:
    try:
        return measure(*arguments)
    except WrongResult as error:
        return {"wrong": str(error)}


def _against(figures: Figures, *, peer: Figures | None, same_run: bool) -> Figures:
    if peer is None or "ms" not in figures:
        return figures
    return figures | {
        "dense_ms": peer["ms"],
        "rate_ratio": figures["tflops"] / peer["tflops"],
        "speedup": peer["ms"] / figures["ms"],
        "dense_in_same_run": same_run,
    }
