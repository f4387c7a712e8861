"""Times the pieces of index building: `python -m minference_jax.index.measure`.

On the default device, for one layer of Llama-3-8B's shape. Each piece is a program of its own, so
their sum is a little more than the whole. A time is that of `repeats` calls queued back to back,
divided by their number (the median of three such rounds): the device's time, or the host's where
dispatch takes longer.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minference_jax.index import fallback, lines, tiles
from minference_jax.index.build import build_index
from minference_jax.index.select import compact
from minference_jax.patterns import BlockSparse, HeadPatterns, Pattern, VerticalSlash
from pallas_kernels.line_scores import line_scores

HEADS, KV_HEADS, HEAD_DIM, LAST_Q = 32, 8, 128, 64


def milliseconds(call: Callable, *arrays: Any, repeats: int = 10) -> float:
    """Time of one call, by queueing `repeats` of them, after a warm-up that compiles."""
    jax.block_until_ready(call(*arrays))
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        results = [call(*arrays) for _ in range(repeats)]
        jax.block_until_ready(results[-1])
        rounds.append((time.perf_counter() - begin) / repeats * 1e3)
    return sorted(rounds)[1]


def layer_of(pattern: Pattern) -> HeadPatterns:
    """One layer of heads of one pattern."""
    patterns = HeadPatterns.uniform(pattern, num_layers=1, num_heads=HEADS)
    return jax.tree.map(lambda x: x[0], patterns)


def pieces(q: Array, k: Array, patterns: HeadPatterns, block: int) -> Iterator[tuple[str, float]]:
    """Times of the parts of a vertical-slash index and of the whole."""
    kv_len = k.shape[1]
    lengths = jnp.full((q.shape[0],), kv_len)
    first = lengths - LAST_Q
    blocks = {"block_q": block, "block_kv": block}
    over_heads = lambda f: jax.jit(jax.vmap(jax.vmap(f)))

    last = jax.block_until_ready(q[:, -LAST_Q:])
    scores = jax.jit(functools.partial(line_scores, first=first, lengths=lengths))
    yield "line_scores", milliseconds(scores, last, k)
    vertical, slash = scores(last, k)

    select = jax.jit(functools.partial(lines.choose_lines, patterns=patterns, lengths=lengths))
    yield "selection", milliseconds(select, vertical, slash)
    columns, distances = select(vertical, slash)

    key = jnp.arange(kv_len, dtype=jnp.int32)
    gather = over_heads(lambda mask: compact(key, mask, patterns.max_columns, kv_len))
    yield "compaction", milliseconds(gather, columns)
    columns = gather(columns)

    cut = over_heads(lambda mask: tiles.tiles_of_distances(mask, jnp.int32(0), **blocks))
    yield "tiles", milliseconds(cut, distances)
    entries = cut(distances)

    origin = jnp.arange(0, kv_len, block)
    reach = over_heads(lambda entries: tiles.count_reaching(entries, origin, block))
    yield "counts", milliseconds(reach, entries)

    @jax.jit
    def fall_back(count, columns):
        used = jnp.full(count.shape[:2], patterns.max_columns)
        executed = fallback.executed_tiles(count, columns, used, origin + block - 1, block)
        return fallback.heads_above(executed, count[:, :1], 1.0)

    yield "fallback", milliseconds(fall_back, reach(entries), columns)
    yield "whole", milliseconds(jax.jit(whole(block)), patterns, q, k)


def whole(block: int) -> Callable:
    """The index of a layer, as the attention builds it."""
    return functools.partial(
        build_index, block_q=block, block_kv=block, last_q=LAST_Q, dense_above=1.0
    )


def index_bytes(q: Array, k: Array, patterns: HeadPatterns, block: int) -> int:
    """Bytes of the index arrays for each head."""
    index = jax.eval_shape(whole(block), patterns, q, k)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(index)) // HEADS


def main() -> None:
    """Prints one JSON line for each length and piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 1048576])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--vertical", type=int, default=1000)
    parser.add_argument("--slash", type=int, default=6096)
    parser.add_argument("--blocks", type=int, default=100, help="block-sparse budget; 0: leave out")
    options = parser.parse_args()
    for length in options.lengths:
        shapes = {"q": (1, length, HEADS, HEAD_DIM), "k": (1, length, KV_HEADS, HEAD_DIM)}
        keys = jax.random.split(jax.random.key(length), 2)
        q, k = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes.values(), strict=True)
        )
        pattern = VerticalSlash(vertical_size=options.vertical, slash_size=options.slash)
        patterns = layer_of(pattern)
        report = functools.partial(_report, length=length)
        for piece, ms in pieces(q, k, patterns, options.block):
            report(piece=piece, ms=round(ms, 3))
        report(piece="bytes per head", bytes=index_bytes(q, k, patterns, options.block))
        if options.blocks:
            patterns = layer_of(BlockSparse(num_blocks=options.blocks))
            ms = milliseconds(jax.jit(whole(options.block)), patterns, q, k, repeats=3)
            report(piece=f"block-sparse {options.blocks}, whole", ms=round(ms, 3))


def _report(**fields) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
