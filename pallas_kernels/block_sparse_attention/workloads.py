"""Indices of known patterns, built on the host: what tests and benchmarks of the kernels run on.

The line sets are synthetic. "contiguous" takes the nearest distances, "clustered" half the nearest
and half in runs of ten, "scattered" the nearest hundred and the rest one by one.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.index import ALIGNMENT, NO_TILE, BlockSparseIndex
from pallas_kernels.common.tiling import cdiv, round_up

Spread = Literal["contiguous", "clustered", "scattered"]

_SINKS = 30
_NEAR = 100


def dense_index(
    batch: int, heads: int, q_len: int, kv_len: int, *, block_q: int = 128, block_kv: int = 128
) -> BlockSparseIndex:
    """Every causal pair; all heads share one list of distances."""
    distances = np.arange(kv_len)
    return lines_index(
        [np.zeros(0, int)] * heads, [distances] * heads, batch, q_len, kv_len,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip


def a_shape_index(
    batch: int, heads: int, q_len: int, kv_len: int, *, sink: int, window: int,
    block_q: int = 128, block_kv: int = 128,
) -> BlockSparseIndex:  # fmt: skip
    """The first `sink` columns and the nearest `window` distances."""
    columns, distances = np.arange(min(sink, kv_len)), np.arange(min(window, kv_len))
    return lines_index(
        [columns] * heads, [distances] * heads, batch, q_len, kv_len,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip


def vertical_slash_index(
    batch: int, heads: int, q_len: int, kv_len: int, *, vertical: int, slash: int, spread: Spread,
    block_q: int = 128, block_kv: int = 128, staggered: bool = False, seed: int = 0,
) -> BlockSparseIndex:  # fmt: skip
    """Random lines, another set for each head."""
    rng = np.random.default_rng(seed)
    vertical, slash = min(vertical, kv_len), min(slash, kv_len)
    columns = [_columns(rng, kv_len, vertical) for _ in range(heads)]
    distances = [_distances(rng, kv_len, slash, spread) for _ in range(heads)]
    return lines_index(
        columns,
        distances,
        batch,
        q_len,
        kv_len,
        block_q=block_q,
        block_kv=block_kv,
        staggered=staggered,
    )


def block_sparse_index(
    batch: int, heads: int, q_len: int, kv_len: int, *, blocks: int,
    block_q: int = 128, block_kv: int = 128, seed: int = 0,
) -> BlockSparseIndex:  # fmt: skip
    """Random key tiles for each query tile, those of its own rows always among them."""
    rng = np.random.default_rng(seed)
    rows = cdiv(q_len, block_q)
    capacity = min(blocks, cdiv(kv_len, block_kv))
    entries = np.full((heads, rows, capacity), NO_TILE, np.int32)
    count = np.zeros((heads, rows), np.int32)
    for row in range(rows):
        first = kv_len - q_len + row * block_q
        own = np.arange(
            first // block_kv, min(cdiv(first + block_q, block_kv), cdiv(kv_len, block_kv))
        )
        others = min(max(blocks - len(own), 0), int(own[0]))
        for head in range(heads):
            far = rng.choice(own[0], others, replace=False) if others else np.zeros(0, int)
            tiles = np.sort(np.concatenate([own, far]))[::-1][:capacity] * block_kv
            entries[head, row, : len(tiles)] = tiles
            count[head, row] = len(tiles)
    shape = (batch, heads, rows)
    begin = np.broadcast_to(np.arange(rows) * capacity, shape)
    return BlockSparseIndex(
        entries=_batched(entries.reshape(heads, -1), batch),
        begin=jnp.asarray(begin, jnp.int32),
        count=_batched(count, batch),
        origin=jnp.zeros(shape, jnp.int32),
        columns=jnp.zeros((batch, heads, 0), jnp.int32),
        column_count=jnp.zeros((batch, heads), jnp.int32),
        block_q=block_q,
        block_kv=block_kv,
    )


def lines_index(
    columns: list[np.ndarray], distances: list[np.ndarray], batch: int, q_len: int, kv_len: int, *,
    block_q: int = 128, block_kv: int = 128, staggered: bool = False,
) -> BlockSparseIndex:  # fmt: skip
    """The lists of heads given by their columns and distances (every needed key is visited)."""
    first = kv_len - q_len + np.arange(cdiv(q_len, block_q)) * block_q
    origin = first // ALIGNMENT * ALIGNMENT
    misalign = int(first[0] - origin[0])
    shift = block_q // 2 if staggered else 0
    cut = {}
    lists = []
    for chosen in distances:
        key = chosen.tobytes()
        if key not in cut:
            cut[key] = _cut(
                chosen, misalign, kv_len, block_q // 2 if staggered else block_q, block_kv
            )
        lists.append(cut[key])
    capacity = max(max(map(len, lists)), 1)
    entries = np.full((len(lists), capacity), NO_TILE, np.int32)
    for head, tiles in enumerate(lists):
        entries[head, : len(tiles)] = tiles
    reach = origin + block_kv + shift
    count = np.stack([np.searchsorted(-tiles, reach, "left") for tiles in lists])
    width = max(max(map(len, columns)), 0)
    padded = np.zeros((len(columns), width), np.int32)
    for head, chosen in enumerate(columns):
        padded[head, : len(chosen)] = np.sort(chosen)
    shape = (batch, len(lists), len(first))
    return BlockSparseIndex(
        entries=_batched(entries, batch),
        begin=jnp.zeros(shape, jnp.int32),
        count=_batched(count, batch),
        origin=jnp.asarray(np.broadcast_to(origin, shape), jnp.int32),
        columns=_batched(padded, batch),
        column_count=_batched(np.array([len(x) for x in columns]), batch),
        block_q=block_q,
        block_kv=block_kv,
        shift=jnp.full(shape, shift, jnp.int32) if staggered else None,
    )


def _batched(x, batch):
    return jnp.asarray(np.broadcast_to(x, (batch, *x.shape)), jnp.int32)


def _columns(rng, kv_len, size):
    sinks = np.arange(min(_SINKS, size))
    rest = rng.choice(np.arange(len(sinks), kv_len), size - len(sinks), replace=False)
    return np.concatenate([sinks, rest])


def _distances(rng, kv_len, size, spread: Spread):
    if spread == "contiguous":
        return np.arange(size)
    near = min(size, _NEAR) if spread == "scattered" else size // 2
    run = 1 if spread == "scattered" else 10
    starts = rng.choice(
        max((kv_len - near) // run, 1),
        min(cdiv(size - near, run), (kv_len - near) // run),
        replace=False,
    )
    far = (near + starts[:, None] * run + np.arange(run)[None, :]).reshape(-1)[: size - near]
    return np.concatenate([np.arange(near), far])


def _cut(distances, misalign, kv_len, rows, block_kv):
    """Greedy cover, from near to far, of the keys that `rows` rows need (offsets from origin)."""
    top = round_up(rows + misalign, ALIGNMENT)
    granules = round_up(kv_len + 2 * rows, ALIGNMENT) // ALIGNMENT
    edges = np.zeros(granules + 1, np.int64)
    # Distance d needs the offsets misalign - d .. misalign - d + rows - 1; granules of 8 keys count
    # downwards from `top`.
    nearest = (top - 1 - (misalign - distances + rows - 1)) // ALIGNMENT
    farthest = (top - 1 - (misalign - distances)) // ALIGNMENT
    np.add.at(edges, np.minimum(nearest, granules), 1)
    np.add.at(edges, np.minimum(farthest + 1, granules), -1)
    needed = np.flatnonzero(np.cumsum(edges)[:granules] > 0)
    tiles, at = [], 0
    while at < len(needed):
        tiles.append(top - ALIGNMENT * int(needed[at]) - block_kv)
        at = int(np.searchsorted(needed, needed[at] + block_kv // ALIGNMENT))
    return np.array(tiles, np.int64)
