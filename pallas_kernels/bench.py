"""Times of the attention kernel beside cuDNN's dense attention, in one run: `--help`.

Every workload is checked first: sampled query tiles against float32 attention over the exact
visited set. TFLOP/s count the key tiles and column tiles that a call visits, 4 * rows * keys *
head_dim each; dense calls count the causal half, as the peer does. Times are medians of calls with
the plan and the gather of columns inside, which are also timed alone.
"""

import argparse
import dataclasses
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.block_sparse_attention import BlockSparseIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention import workloads as make
from pallas_kernels.block_sparse_attention.plan import gather_columns, make_plan

# Relative RMS error of a sampled query tile that fails the gate (bfloat16 gives 0.002).
_TOLERANCE = 0.01

_LINES = ((1000, 6096), (500, 700), (3500, 100))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A pattern by its name, and how its index is built for a number of heads and keys."""

    name: str
    build: Callable[[int, int], BlockSparseIndex]


def workloads(spreads: list[make.Spread]) -> Iterator[Workload]:
    """The patterns of the shipped configurations, lines with each spread asked for."""
    yield Workload("dense", lambda h, n: make.dense_index(1, h, n, n))
    yield Workload(
        "a_shape-128-1024", lambda h, n: make.a_shape_index(1, h, n, n, sink=128, window=1024)
    )
    for spread in spreads:
        for vertical, slash in _LINES:
            for staggered in (True, False):
                build = functools.partial(
                    make.vertical_slash_index, vertical=vertical, slash=slash, spread=spread,
                    staggered=staggered,
                )  # fmt: skip
                kind = "staggered" if staggered else "plain"
                yield Workload(
                    f"lines-{vertical}-{slash}-{spread}-{kind}",
                    lambda h, n, build=build: build(1, h, n, n),
                )
    # 100 blocks of 64 keys are 50 tiles of 128.
    yield Workload("blocks-100", lambda h, n: make.block_sparse_index(1, h, n, n, blocks=50))


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--spreads", nargs="*", default=["contiguous", "clustered", "scattered"])
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--peer", default="cudnn", choices=["cudnn", "none"])
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    options = parser.parse_args(arguments)
    environment = _environment(sys.argv[1:] if arguments is None else arguments)
    print(environment, flush=True)
    for kv_len in options.lengths:
        for record in _bench_length(options, kv_len):
            print(_line(record), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(record | environment) + "\n")


def _bench_length(options: argparse.Namespace, kv_len: int) -> Iterator[dict]:
    shape = {"kv_len": kv_len, "heads": options.heads, "kv_heads": options.kv_heads,
             "head_dim": options.head_dim, "dtype": options.dtype}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, heads: jax.random.normal(
        key, (1, kv_len, heads, options.head_dim), options.dtype
    )
    q, k, v = map(normal, keys, (options.heads, options.kv_heads, options.kv_heads))
    causal = kv_len**2 / 2 * 4 * options.head_dim * options.heads
    dense = None
    if options.peer == "cudnn":
        seconds = measure(
            functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
            ),
            q, k, v,
        )  # fmt: skip
        dense = causal / seconds / 1e12
        yield shape | {"name": "cudnn-dense", "ms": seconds * 1e3, "tflops": dense}
    for workload in workloads(options.spreads):
        if options.only not in workload.name:
            continue
        index = workload.build(options.heads, kv_len)
        record = _bench_workload(q, k, v, index, options.implementation)
        if workload.name == "dense":
            record["tflops"] = causal / record["ms"] / 1e9
        if dense is not None:
            record["ratio"] = record["tflops"] / dense
        yield shape | {"name": workload.name, **record}


def _bench_workload(q, k, v, index: BlockSparseIndex, implementation: str) -> dict:
    lengths, q_offset = jnp.full((1,), k.shape[1], jnp.int32), jnp.int32(0)
    run = functools.partial(block_sparse_attention, implementation=implementation)
    error = check(jax.jit(run)(q, k, v, index), q, k, v, index)
    if not error < _TOLERANCE:
        raise SystemExit(f"a sampled query tile is wrong: relative RMS error {error}")
    plan = jax.jit(lambda index: make_plan(index, lengths=lengths, q_offset=q_offset))
    column_tiles = np.asarray(plan(index).lists)[..., -1].sum(dtype=np.float64)
    tiles = np.asarray(index.count).sum(dtype=np.float64) + column_tiles
    visited = tiles * index.block_q * index.block_kv
    seconds = measure(run, q, k, v, index)
    return {
        "ms": seconds * 1e3,
        "plan_ms": measure(plan, index) * 1e3,
        "gather_ms": measure(gather_columns, k, v, index) * 1e3 if index.columns.size else 0.0,
        "tflops": 4 * q.shape[3] * visited / seconds / 1e12,
        "keys_per_row": visited / q.shape[1] / q.shape[2],
        "density": float(jnp.mean(jax.jit(lambda i: i.density(q.shape[1], k.shape[1]))(index))),
        "error": error,
    }


def measure(function: Callable, *arrays, target: float = 0.4) -> float:
    """Median seconds of a jitted call, of calls in flight together where they are short."""
    compiled = jax.jit(function).lower(*arrays).compile()
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    first = time.perf_counter() - start
    if first > 2.0:
        return first
    jax.block_until_ready(compiled(*arrays))
    times: list[float] = []
    number = max(1, min(20, int(target / 5 / first)))
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arrays) for _ in range(number)][-1])
        times.append((time.perf_counter() - start) / number)
    return float(np.median(times))


def check(out: Array, q: Array, k: Array, v: Array, index: BlockSparseIndex) -> float:
    """Largest relative RMS error over sampled query tiles, against float32."""
    tiles, heads = index.begin.shape[2], q.shape[2]
    sample = [(0, 0), (tiles - 1, heads - 1), (tiles // 2, heads // 3), (tiles * 7 // 9, 1)]
    errors = [_tile_error(out, q, k, v, index, jnp.int32(t), jnp.int32(h)) for t, h in sample]
    return float(np.max(np.asarray(errors)))


@jax.jit
def _tile_error(out, q, k, v, index, tile, head):
    rows = tile * index.block_q + jnp.arange(index.block_q)
    real = rows < q.shape[1]
    take = lambda x: jnp.take(x[0], jnp.minimum(rows, q.shape[1] - 1), axis=0)[:, head]
    kv_head = head // (q.shape[2] // k.shape[2])
    one = lambda x: x[:, head, tile][:, None, None]
    part = dataclasses.replace(
        index, entries=index.entries[:, head][:, None], begin=one(index.begin),
        count=one(index.count), origin=one(index.origin), columns=index.columns[:, head][:, None],
        column_count=index.column_count[:, head][:, None],
        shift=None if index.shift is None else one(index.shift),
    )  # fmt: skip
    mask = part.to_mask(index.block_q, k.shape[1], q_offset=tile * index.block_q)[0, 0]
    scores = jnp.dot(take(q).astype(jnp.float32), k[0, :, kv_head].astype(jnp.float32).T,
                     precision="highest")  # fmt: skip
    weights = jax.nn.softmax(jnp.where(mask, scores * q.shape[3] ** -0.5, -jnp.inf), axis=-1)
    expected = jnp.dot(weights, v[0, :, kv_head].astype(jnp.float32), precision="highest")
    difference = jnp.where(real[:, None], take(out).astype(jnp.float32) - expected, 0.0)
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(jnp.where(real[:, None], expected, 0.0) ** 2))


def _environment(arguments: list[str]) -> dict:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m pallas_kernels.bench " + " ".join(arguments),
    }


def _line(record: dict) -> str:
    text = f"{record['kv_len']:>8} {record['name']:<40} {record['ms']:>10.3f} ms"
    text += f" {record['tflops']:>6.0f} TFLOP/s"
    if "ratio" in record:
        text += f" {record['ratio']:>6.3f} x"
    if "density" in record:
        text += f", density {record['density']:.4f}"
        text += f", plan {record['plan_ms']:.3f} ms, gather {record['gather_ms']:.3f} ms"
    return text


if __name__ == "__main__":
    main()
