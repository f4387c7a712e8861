"""Times of the attention kernel beside cuDNN's dense attention, in one run: `--help`.

Every workload is checked first: sampled query tiles against float32 attention over the exact
visited set. TFLOP/s count the key tiles and column tiles that a call visits, 4 * rows * keys *
head_dim each; dense calls count the causal half, as the peer does. Times are medians of calls with
the plan and the gather of columns inside, which are also timed alone. Workloads whose indices
differ in length alone share a program: the shorter lists are filled up with entries that are never
read.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from pallas_kernels.block_sparse_attention import BlockSparseIndex
from pallas_kernels.block_sparse_attention import workloads as make
from pallas_kernels.block_sparse_attention.measure import (
    WrongResult,
    add_kernel,
    causal_flops,
    measure_kernel,
    random_qkv,
    share_shapes,
)
from pallas_kernels.common.environment import stamp
from pallas_kernels.common.timing import Programs, time_calls

LINES = ((1000, 6096), (500, 700), (3500, 100))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A pattern by its name, and how its index is built for a number of heads and keys."""

    name: str
    build: Callable[[int, int], BlockSparseIndex]


def workloads(
    spreads: list[make.Spread], block_kvs: list[int], *, plain: bool = False
) -> Iterator[Workload]:
    """The patterns of the shipped configurations, lines with each spread and key tile asked for.

    Args:
        spreads: how the lines lie.
        block_kvs: keys of a tile of lines; other patterns have tiles of 128.
        plain: also lines whose tiles are not staggered.
    """
    yield Workload("dense", lambda h, n: make.dense_index(1, h, n, n))
    yield Workload(
        "a_shape-128-1024", lambda h, n: make.a_shape_index(1, h, n, n, sink=128, window=1024)
    )
    for spread in spreads:
        for vertical, slash in LINES:
            for block_kv in block_kvs:
                for staggered in (True, False) if plain else (True,):
                    build = functools.partial(
                        make.vertical_slash_index, vertical=vertical, slash=slash, spread=spread,
                        staggered=staggered, block_kv=block_kv,
                    )  # fmt: skip
                    name = f"lines-{vertical}-{slash}-{spread}"
                    name += "" if staggered else "-plain"
                    name += "" if block_kv == 96 else f"-kv{block_kv}"
                    yield Workload(name, lambda h, n, build=build: build(1, h, n, n))
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
    parser.add_argument("--block-kv", type=int, nargs="+", default=[96], help="for lines")
    parser.add_argument("--plain", action="store_true", help="also lines that are not staggered")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--peer", default="cudnn", choices=["cudnn", "none"])
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    options = parser.parse_args(arguments)
    environment = stamp("pallas_kernels.bench", sys.argv[1:] if arguments is None else arguments)
    print(environment, flush=True)
    try:
        for kv_len in options.lengths:
            for record in _bench_length(options, kv_len):
                print(_line(record), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(record | environment) + "\n")
    except WrongResult as error:
        raise SystemExit(str(error)) from None


def _bench_length(options: argparse.Namespace, kv_len: int) -> Iterator[dict]:
    shape = {"kv_len": kv_len, "heads": options.heads, "kv_heads": options.kv_heads,
             "head_dim": options.head_dim, "dtype": options.dtype}  # fmt: skip
    draw = lambda key: random_qkv(
        key, kv_len, options.heads, options.kv_heads, options.head_dim, options.dtype
    )
    q, k, v = jax.jit(draw)(jax.random.key(0))
    chosen = [
        workload
        for workload in workloads(options.spreads, options.block_kv, plain=options.plain)
        if options.only in workload.name
    ]
    indices = share_shapes([workload.build(options.heads, kv_len) for workload in chosen])
    programs = Programs()
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if options.peer == "cudnn":
        programs.add("cudnn", cudnn, q, k, v)
    for index in indices:
        add_kernel(programs, q, k, v, index, options.implementation)
    programs.compile()
    dense = None
    if options.peer == "cudnn":
        seconds = np.median(time_calls(programs.get("cudnn", q, k, v), q, k, v))
        dense = causal_flops(q) / seconds / 1e12
        yield shape | {"name": "cudnn-dense", "ms": seconds * 1e3, "tflops": dense}
    for workload, index in zip(chosen, indices, strict=True):
        record = measure_kernel(programs, q, k, v, index)
        if workload.name == "dense":
            record["tflops"] = causal_flops(q) / record["ms"] / 1e9
        if dense is not None:
            record["ratio"] = record["tflops"] / dense
        yield shape | {"name": workload.name, **record}


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
