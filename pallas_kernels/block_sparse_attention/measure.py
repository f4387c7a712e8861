"""Checking and timing the op over one index: what benchmarks share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.api import Implementation, block_sparse_attention
from pallas_kernels.block_sparse_attention.index import NO_TILE, BlockSparseIndex
from pallas_kernels.block_sparse_attention.plan import gather_columns, make_plan
from pallas_kernels.common.tiling import round_up
from pallas_kernels.common.timing import Programs, Shaped, time_calls

# Relative RMS error of a sampled query tile that fails the gate (bfloat16 gives 0.002).
TOLERANCE = 0.01
# (query tile, list entry) pairs counted at a time.
_ELEMENTS = 2**24


class WrongResult(Exception):
    """A kernel's output is not what float32 attention over the visited keys gives."""


def random_qkv(
    key: Array, kv_len: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> tuple[Array, Array, Array]:
    """Normal queries, keys and values; jittable."""
    keys = jax.random.split(key, 3)
    q, k, v = (
        jax.random.normal(key, (1, kv_len, number, head_dim), dtype)
        for key, number in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )
    return q, k, v


def causal_flops(q: Float[Array, "1 kv_len heads head_dim"]) -> float:
    """Operations of dense causal attention: the half below the diagonal."""
    _, kv_len, heads, head_dim = q.shape
    return kv_len**2 / 2 * 4 * head_dim * heads


def share_shapes(
    indices: list[BlockSparseIndex], like: tuple[BlockSparseIndex, ...] = ()
) -> list[BlockSparseIndex]:
    """Fills entries and columns up to common capacities, so that programs are shared.

    Indices that need the same tiles of columns share; what is filled up is never read, and columns
    are not filled beyond the tile of `block_kv` that the kernel reads anyway.

    Args:
        indices: to be filled up.
        like: others (or their shapes) to share with, where theirs is the largest capacity.
    """
    kind = lambda x: (x.block_q, x.block_kv, x.staggered, round_up(x.columns.shape[2], x.block_kv))
    entries: dict = {}
    for index in (*indices, *like):
        entries[kind(index)] = max(entries.get(kind(index), 0), index.entries.shape[2])

    def fill(index):
        missing = entries[kind(index)] - index.entries.shape[2]
        width = kind(index)[3] - index.columns.shape[2]
        # On the host: the device would compile each of these.
        pad = lambda x, by, value: jnp.asarray(
            np.pad(np.asarray(x), ((0, 0), (0, 0), (0, by)), constant_values=value)
        )
        return dataclasses.replace(
            index,
            entries=pad(index.entries, missing, NO_TILE),
            columns=pad(index.columns, width, 0),
        )

    return [fill(index) for index in indices]


def add_kernel(
    programs: Programs, q: Shaped, k: Shaped, v: Shaped, index: BlockSparseIndex,
    implementation: Implementation | None, *, alone: bool = True,
) -> None:  # fmt: skip
    """Adds what `measure_kernel` runs; without `alone`, only what checks and counts.

    Arrays may be shapes.
    """
    programs.add("gate", gate, q, q, k, v, index)
    lengths, q_offset = jnp.full((1,), k.shape[1], jnp.int32), jnp.int32(0)
    plan = functools.partial(make_plan, lengths=lengths, q_offset=q_offset)
    programs.add("plan", plan, index)
    if not alone:
        return
    attend = functools.partial(block_sparse_attention, implementation=implementation)
    programs.add("attend", attend, q, k, v, index)
    if index.columns.shape[2]:
        programs.add("gather", gather_columns, k, v, index)


def measure_kernel(
    programs: Programs, q: Array, k: Array, v: Array, index: BlockSparseIndex
) -> dict:
    """Checks and times attention over one index; `programs` holds what `add_kernel` added.

    Raises:
        WrongResult: a sampled query tile is wrong.
    """
    figures: dict = {}

    def check(out):
        figures.update(judge(programs.get("gate", q, q, k, v, index)(out, q, k, v, index)))

    runs = time_calls(programs.get("attend", q, k, v, index), q, k, v, index, check=check)
    executed = executed_keys(programs, index)
    gather = 0.0
    if index.columns.shape[2]:
        gather = np.median(time_calls(programs.get("gather", k, v, index), k, v, index))
    return {
        "ms": np.median(runs) * 1e3,
        "runs_ms": [seconds * 1e3 for seconds in runs],
        "plan_ms": np.median(time_calls(programs.get("plan", index), index)) * 1e3,
        "gather_ms": gather * 1e3,
        "tflops": 4 * q.shape[3] * executed / np.median(runs) / 1e12,
        "keys_per_row": executed / q.shape[1] / q.shape[2],
        **figures,
        "block_kv": index.block_kv,
        "capacities": [index.entries.shape[2], index.columns.shape[2]],
    }


def executed_keys(programs: Programs, index: BlockSparseIndex) -> float:
    """(Query, key) pairs that the kernel computes: whole key tiles and tiles of columns."""
    column_tiles = np.asarray(programs.get("plan", index)(index).lists)[..., -1]
    tiles = np.asarray(index.count).sum(dtype=np.float64) + column_tiles.sum(dtype=np.float64)
    return float(tiles * index.block_q * index.block_kv)


def judge(gate: tuple[Array, Array]) -> dict[str, float]:
    """The figures of `gate`; raises WrongResult if the error is no rounding error."""
    error, density = map(float, gate)
    if not error < TOLERANCE:
        raise WrongResult(f"a sampled query tile is wrong: relative RMS error {error}")
    return {"density": density, "error": error}


def gate(
    out: Array, q: Array, k: Array, v: Array, index: BlockSparseIndex
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Largest relative RMS error of sampled query tiles, and the exact density over all heads."""
    tiles, heads = index.begin.shape[2], q.shape[2]
    sample = [(0, 0), (tiles - 1, heads - 1), (tiles // 2, heads // 3), (tiles * 7 // 9, 1)]
    errors = jax.lax.map(
        lambda where: _tile_error(out, q, k, v, index, *where),
        tuple(jnp.array(sample, jnp.int32).T),
    )
    pairs = lambda tile: _one_tile(index, tile).visited_pairs(
        index.block_q, k.shape[1], q_offset=tile * index.block_q
    )
    visited, causal = jax.lax.map(
        pairs, jnp.arange(tiles), batch_size=max(1, _ELEMENTS // index.entries.size)
    )
    return jnp.max(errors), jnp.sum(visited) / jnp.sum(causal)


def _one_tile(index: BlockSparseIndex, tile: Array) -> BlockSparseIndex:
    one = lambda x: jnp.take(x, tile[None], axis=2)
    return dataclasses.replace(
        index, begin=one(index.begin), count=one(index.count), origin=one(index.origin),
        shift=None if index.shift is None else one(index.shift),
    )  # fmt: skip


def _tile_error(out, q, k, v, index, tile, head):
    rows = tile * index.block_q + jnp.arange(index.block_q)
    real = rows < q.shape[1]
    take = lambda x: jnp.take(x[0], jnp.minimum(rows, q.shape[1] - 1), axis=0)[:, head]
    kv_head = head // (q.shape[2] // k.shape[2])
    one_head = jax.tree.map(lambda x: jnp.take(x, head[None], axis=1), _one_tile(index, tile))
    mask = one_head.to_mask(index.block_q, k.shape[1], q_offset=tile * index.block_q)[0, 0]
    scores = jnp.dot(take(q).astype(jnp.float32), k[0, :, kv_head].astype(jnp.float32).T,
                     precision="highest")  # fmt: skip
    weights = jax.nn.softmax(jnp.where(mask, scores * q.shape[3] ** -0.5, -jnp.inf), axis=-1)
    expected = jnp.dot(weights, v[0, :, kv_head].astype(jnp.float32), precision="highest")
    difference = jnp.where(real[:, None], take(out).astype(jnp.float32) - expected, 0.0)
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(jnp.where(real[:, None], expected, 0.0) ** 2))
