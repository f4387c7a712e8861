"""Times of the implementations of block scores side by side: `--help`.

Causal tiles of 128 rows over blocks of 128 keys, random data. Rows are given as they are, or fewer
of them, as if every few had been replaced by their mean (that is not timed). Each implementation is
checked first: sampled tiles of all heads against the definition. TFLOP/s count the products with
visible means once, whatever an implementation computes.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores import reference
from pallas_kernels.block_scores.api import block_scores
from pallas_kernels.common.environment import stamp
from pallas_kernels.common.tiling import cdiv
from pallas_kernels.common.timing import Programs, time_calls

BLOCK = 128
# Relative RMS error of a sampled tile that fails the check.
TOLERANCE = 1e-4


def main(arguments: list[str] | None = None) -> None:
    """Prints, and on request appends to a file, one JSON line for each time."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.block_scores.measure", description=__doc__
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--pooled", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--implementations", nargs="+", default=["mosaic_gpu", "xla"])
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads or any(BLOCK % pooled for pooled in options.pooled):
        parser.error(f"--kv-heads must divide --heads, and every --pooled {BLOCK}")
    module = "pallas_kernels.block_scores.measure"
    environment = stamp(module, sys.argv[1:] if arguments is None else arguments)
    for kv_len in options.lengths:
        for pooled in options.pooled:
            for record in _measure(options, kv_len, pooled):
                line = json.dumps(record | environment)
                print(line, flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(line + "\n")


def _measure(options: argparse.Namespace, kv_len: int, pooled: int) -> Iterator[dict]:
    """Records of all implementations; raises SystemExit if one is wrong."""
    tiles, tile_rows = cdiv(kv_len, BLOCK), BLOCK // pooled
    group = options.heads // options.kv_heads
    draw = functools.partial(jax.random.normal, dtype=options.dtype)
    keys = jax.random.split(jax.random.key(0), 2)
    rows = cdiv(kv_len, pooled)
    q = draw(keys[0], (1, rows, options.kv_heads, group, 1, options.head_dim))
    means = draw(keys[1], (1, options.kv_heads, tiles, options.head_dim))
    past, real_rows = jnp.arange(tiles, dtype=jnp.int32), jnp.full((1,), rows, jnp.int32)
    programs = Programs()
    for name in options.implementations:
        run = functools.partial(_scores, tile_rows=tile_rows, implementation=name)
        programs.add(name, run, q, means, past, real_rows)
    gate = functools.partial(largest_error, tile_rows=tile_rows)
    scores = jax.ShapeDtypeStruct((1, *means.shape[1:2], group, tiles, tiles), jnp.float32)
    programs.add("gate", gate, scores, q, means, past)
    programs.compile()
    products = 2 * options.head_dim * options.heads * tile_rows * (tiles * (tiles - 1) // 2)
    for name in options.implementations:
        errors = []

        def check(out, name=name, errors=errors):
            errors.append(float(programs.get("gate", out, q, means, past)(out, q, means, past)))
            if not errors[0] < TOLERANCE:
                raise SystemExit(f"{name} is wrong: relative RMS error {errors[0]} of a tile")

        call = programs.get(name, q, means, past, real_rows)
        runs = time_calls(call, q, means, past, real_rows, check=check)
        yield {
            "name": name, "kv_len": kv_len, "pooled": pooled, "heads": options.heads,
            "kv_heads": options.kv_heads, "head_dim": options.head_dim, "dtype": options.dtype,
            "ms": np.median(runs) * 1e3, "runs_ms": [seconds * 1e3 for seconds in runs],
            "tflops": products / np.median(runs) / 1e12, "error": errors[0],
        }  # fmt: skip


def _scores(q, means, past, real_rows, *, tile_rows, implementation):
    return block_scores(
        q, means, past=past, real_rows=real_rows, tile_rows=tile_rows, implementation=implementation
    )


def largest_error(
    scores: Float[Array, "1 kv_heads lists tiles num_means"],
    q: Float[Array, "1 rows kv_heads lists members head_dim"],
    means: Float[Array, "1 kv_heads num_means head_dim"],
    past: Int[Array, " tiles"],
    *,
    tile_rows: int,
) -> Float[Array, ""]:
    """Largest relative RMS error of sampled tiles that see a mean, each over all heads."""
    tiles = scores.shape[3]
    rows = jnp.pad(q, ((0, 0), (0, tiles * tile_rows - q.shape[1]), *((0, 0),) * 4))

    def one_tile(tile):
        part = jax.lax.dynamic_slice_in_dim(rows, tile * tile_rows, tile_rows, axis=1)
        want = reference.block_scores(
            part, means, past=past[tile][None], tile_rows=tile_rows,
            real_rows=jnp.clip(q.shape[1] - tile * tile_rows, 0, tile_rows)[None],
        )  # fmt: skip
        got = jax.lax.dynamic_slice_in_dim(scores, tile, 1, axis=3)
        return jnp.sqrt(jnp.sum((got - want) ** 2) / jnp.sum(want**2))

    sample = jnp.array([min(1, tiles - 1), tiles // 2, tiles * 7 // 9, tiles - 1])
    return jnp.max(jax.lax.map(one_tile, sample))


if __name__ == "__main__":
    main()
