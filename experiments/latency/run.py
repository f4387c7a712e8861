"""Measuring at one length: programs compiled together, then peers, kernels and layers."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common.measure import stage
from experiments.latency.inputs import structured_qkv
from experiments.latency.layer import LayerCase, add_layer, index_shapes, measure_layer
from experiments.latency.peers import add_jax_dense, jax_dense_name, other_peers
from experiments.latency.rows import Figures, Level, Point
from models.common.config import DecoderConfig
from pallas_kernels.bench import Workload
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
        longest_peer: greatest length at which dense peers are timed.
    """

    workloads: tuple[Workload, ...]
    layers: tuple[LayerCase, ...]
    layer: str
    config: DecoderConfig
    dtype: str
    seed: int
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

    A figure `skipped` or `wrong` in place of times says why there are none. Every other row gets
    `cudnn_ms`, `rate_ratio` (its TFLOP/s over the dense peer's) and `speedup` (the peer's time over
    its own), and whether the peer was timed in this run.

    Args:
        suite: what to measure.
        length: tokens.
        done: points that need no measuring.
        known: figures of the dense peer from an earlier run, for where it is not timed now.
        console: where progress is shown.
    """
    point = functools.partial(suite.point, length=length)
    workloads = [w for w in suite.workloads if point("kernel", w.name) not in done]
    layers = [case for case in suite.layers if point("layer", case.name) not in done]
    config = suite.config
    shape = (length, config.num_heads, config.num_kv_heads, config.head_dim, suite.dtype)
    peers_wanted = length <= suite.longest_peer
    if not workloads and not layers and (known is not None or not peers_wanted):
        return
    programs = Programs()
    q, k, v = random_qkv(*shape)
    draw = functools.partial(
        structured_qkv, length=length, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=jnp.dtype(suite.dtype),
    )  # fmt: skip
    key = jax.random.key(suite.seed)
    with stage(console, f"{length:,} tokens: compiling"):
        reason = add_jax_dense(programs, q, k, v) if peers_wanted else "not asked for"
        indices = share_shapes(
            [workload.build(config.num_heads, length) for workload in workloads],
            like=tuple(index_shapes(case, q, k, v) for case in layers),
        )
        for index in indices:
            add_kernel(programs, q, k, v, index, None)
        for case in layers:
            add_layer(programs, q, k, v, case)
        programs.add("inputs", draw, key)
        programs.compile()

    peer, same_run = known, False
    if reason is None:
        seconds = time_calls(programs.get(jax_dense_name(), q, k, v), q, k, v)
        peer, same_run = _peer_figures(seconds, q), True
        yield point("peer", jax_dense_name()), peer
    else:
        yield point("peer", jax_dense_name()), {"skipped": reason}
    against = functools.partial(_against, peer=peer, same_run=same_run)
    if peers_wanted:
        for name, times in other_peers(q, k, v).items():
            ran = "seconds" in times
            yield (
                point("peer", name),
                (
                    against(_peer_figures(times["seconds"], q)) | {"version": times.get("version")}
                    if ran
                    else times
                ),
            )
    for workload, index in zip(workloads, indices, strict=True):
        figures = _guarded(measure_kernel, programs, q, k, v, index)
        if workload.name == "dense" and "ms" in figures:
            figures["tflops"] = causal_flops(q) / figures["ms"] / 1e9
        yield point("kernel", workload.name), against(figures)
    if layers:
        del q, k, v
        q, k, v = programs.get("inputs", key)(key)
        for case in layers:
            yield (
                point("layer", case.name),
                against(_guarded(measure_layer, programs, q, k, v, case)),
            )


def _peer_figures(seconds: list[float], q) -> Figures:
    median = float(np.median(seconds))
    return {
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
