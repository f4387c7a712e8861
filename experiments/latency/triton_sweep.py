"""Configurations of the Triton kernel beside torch's FlashAttention-2, timed in one process.

Run as `python -m experiments.latency.triton_sweep`; needs a GPU, jax-triton and torch. Every
program is checked before it is timed: sampled query tiles against the definition. Calls are queued
together, on both sides, so that what is timed is the device and not the way to it; plan and gather
of columns are included. TFLOP/s count visited tiles and columns, for dense calls the causal half,
as the peer does.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

# The peer allocates beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from experiments.common.record import append_record
from pallas_kernels.block_sparse_attention import BlockSparseIndex, reference, triton
from pallas_kernels.block_sparse_attention import workloads as make
from pallas_kernels.block_sparse_attention.plan import make_plan

_HEADS, _KV_HEADS = 32, 8
# Relative RMS error of a sampled query tile that fails the gate (bfloat16 gives 0.002).
_TOLERANCE = 0.01

Pattern = Literal["dense", "a-shape", "lines", "lines-staggered"]
_LINES = functools.partial(make.vertical_slash_index, vertical=1000, slash=6096, spread="clustered")
_PATTERNS: dict[Pattern, Callable[..., BlockSparseIndex]] = {
    "dense": make.dense_index,
    "a-shape": functools.partial(make.a_shape_index, sink=128, window=1024),
    "lines": _LINES,
    "lines-staggered": functools.partial(_LINES, staggered=True),
}
# block_m, block_n, num_warps, num_stages; those with more rows than share a list are left out.
_CONFIGS = [
    (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3),
    (128, 64, 4, 2), (128, 32, 8, 3), (128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3),
    (64, 64, 4, 2), (64, 32, 4, 3),
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonSweep:
    """Time the Triton kernel with several configurations."""

    lengths: tuple[int, ...] = (8192, 32768)
    """Tokens."""
    head_dims: tuple[int, ...] = (128, 64)
    """Sizes of a head."""
    patterns: tuple[Pattern, ...] = ("dense", "a-shape", "lines", "lines-staggered")
    """Which keys are visited."""
    capabilities: tuple[int, ...] = ()
    """Compute capabilities to generate code for, e.g. 80 90; the card's own if none. Code for an
    older one is what that card runs: without wgmma for 80, as FlashAttention-2."""
    configs: bool = True
    """Try every configuration; otherwise the default ones."""
    record: Path | None = None
    """JSONL file that records are appended to."""

    def run(self) -> None:
        """Prints and records one line for each program."""
        own = triton._device_capability()
        if own is None:
            raise SystemExit(f"needs a CUDA device, got {jax.devices()[0].device_kind}")
        _assemble_for(own)
        for head_dim, length in itertools.product(self.head_dims, self.lengths):
            for result in self._sweep(head_dim, length, self.capabilities or (own,)):
                shape = {"length": length, "head_dim": head_dim}
                print(_line(shape | result), flush=True)
                if self.record is not None:
                    append_record(
                        self.record, kind="triton-sweep", argv=sys.argv, config=self,
                        result=shape | result,
                    )  # fmt: skip

    def _sweep(
        self, head_dim: int, length: int, capabilities: tuple[int, ...]
    ) -> Iterator[dict[str, Any]]:
        dense = length**2 / 2 * 4 * head_dim * _HEADS
        flash = flash_attention_seconds(length, head_dim)
        yield {"name": "torch-fa2", "ms": flash * 1e3, "tflops": dense / flash / 1e12}
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (1, length, heads, head_dim), jnp.bfloat16)
            for key, heads in zip(keys, (_HEADS, _KV_HEADS, _KV_HEADS), strict=True)
        )
        for pattern in self.patterns:
            index = _PATTERNS[pattern](1, _HEADS, length, length)
            operations = (
                dense if pattern == "dense" else visited_operations(index, length, head_dim)
            )
            choices = [*itertools.product(capabilities, self._configs(index))]
            build = functools.partial(_compiled, q, k, v, index)
            with ThreadPoolExecutor(8) as pool:
                programs = [*pool.map(build, *zip(*choices, strict=True))]
            for (capability, config), program in zip(choices, programs, strict=True):
                result = {
                    "name": pattern, "capability": capability,
                    "config": None if config is None else dataclasses.astuple(config),
                }  # fmt: skip
                yield result | _measure(program, q, k, v, index, operations, dense / flash)

    def _configs(self, index: BlockSparseIndex) -> list[triton.Config | None]:
        rows = index.block_q // index.halves
        if not self.configs:
            return [None]
        names = [field.name for field in dataclasses.fields(triton.Config)]
        tried = [
            triton.Config(**dict(zip(names, choice, strict=True)))
            for choice in _CONFIGS
            if choice[0] <= rows
        ]
        return [None, *tried]


def visited_operations(index: BlockSparseIndex, length: int, head_dim: int) -> float:
    """Operations over whole key tiles and tiles of columns, 4 * rows * keys * head_dim each."""
    plan = jax.jit(make_plan)(index, lengths=jnp.array([length]), q_offset=jnp.int32(0))
    lists = np.asarray(plan.lists, np.float64)
    tiles = np.sum(lists[..., 1] + lists[..., 9])
    return float(tiles * index.block_q * index.block_kv * 4 * head_dim)


def tile_error(
    out: Array, q: Array, k: Array, v: Array, index: BlockSparseIndex, head: int, tile: int
) -> float:
    """Relative RMS error of one query tile of one head against the definition."""
    rows = slice(tile * index.block_q, (tile + 1) * index.block_q)
    kv_head = head // (q.shape[2] // k.shape[2])
    one_head = jax.tree.map(lambda x: x[:, head : head + 1], index)
    one = lambda x: x[:, :, tile : tile + 1]
    part = dataclasses.replace(
        one_head, begin=one(one_head.begin), count=one(one_head.count),
        origin=one(one_head.origin), shift=None if index.shift is None else one(one_head.shift),
    )  # fmt: skip
    want, _ = jax.jit(reference.block_sparse_attention)(
        q[:, rows, head : head + 1], k[:, :, kv_head : kv_head + 1],
        v[:, :, kv_head : kv_head + 1], part, lengths=jnp.array([k.shape[1]]),
        q_offset=jnp.int32(tile * index.block_q),
    )  # fmt: skip
    difference = out[:, rows, head : head + 1].astype(jnp.float32) - want
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(want))


def flash_attention_seconds(length: int, head_dim: int) -> float:
    """Seconds of dense causal FlashAttention-2 through torch."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    arrays = [
        torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device="cuda")
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    ]

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *arrays, is_causal=True, enable_gqa=True
            )

    seconds = seconds_of(call, lambda _: torch.cuda.synchronize())
    del arrays
    torch.cuda.empty_cache()
    return seconds


def seconds_of(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median of five rounds of queued calls; the calls are warm."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    number = max(1, min(20, int(0.08 / (time.perf_counter() - start))))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        wait([call() for _ in range(number)][-1])
        rounds.append((time.perf_counter() - start) / number)
    return float(np.median(rounds))


def _compiled(q, k, v, index, capability: int, config: triton.Config | None):
    """The compiled program, or the error that kept it from being one."""

    def run(q, k, v, index):
        return triton.block_sparse_attention(
            q, k, v, index, lengths=jnp.full((1,), k.shape[1], jnp.int32), q_offset=jnp.int32(0),
            compute_capability=capability, config=config,
        )[0]  # fmt: skip

    try:
        return jax.jit(run).lower(q, k, v, index).compile()
    except Exception as error:  # one configuration that does not fit must not end the sweep
        return error


def _measure(program, q, k, v, index, operations: float, peer: float) -> dict[str, Any]:
    if isinstance(program, Exception):
        return {"failed": str(program)[:200]}
    try:
        out = program(q, k, v, index)
        tiles = index.begin.shape[2]
        sample = ((0, 0), (31, tiles - 1), (10, tiles // 2), (1, tiles * 7 // 9))
        errors = [tile_error(out, q, k, v, index, head, tile) for head, tile in sample]
        error = float(np.max(errors))
        if not error < _TOLERANCE:
            return {"failed": f"wrong: relative RMS error {error}"}
        seconds = seconds_of(lambda: program(q, k, v, index), jax.block_until_ready)
    except jax.errors.JaxRuntimeError as failure:  # too much shared memory, for example
        return {"failed": str(failure)[:200]}
    rate = operations / seconds
    return {"ms": seconds * 1e3, "tflops": rate / 1e12, "ratio": rate / peer, "error": error}


def _assemble_for(capability: int) -> None:
    """Lets code that is generated for another card run on this one: ptxas is told this one."""
    from jax_triton import triton_lib

    library = triton_lib.triton_kernel_call_lib
    make_kernel = library.TritonKernel
    library.TritonKernel = lambda *arguments: make_kernel(*arguments[:-1], capability)


def _line(result: dict[str, Any]) -> str:
    text = f"{result['length']:>7} d{result['head_dim']:<4}{result['name']:<16}"
    text += f"{result.get('capability', ''):<4}{result.get('config') or 'default'!s:<20}"
    if "failed" in result:
        return text + result["failed"]
    text += f"{result['ms']:>9.3f} ms {result['tflops']:>6.0f} TFLOP/s"
    return text + (f" {result['ratio']:>6.3f} x" if "ratio" in result else "")


if __name__ == "__main__":
    tyro.cli(TritonSweep, description=__doc__).run()
