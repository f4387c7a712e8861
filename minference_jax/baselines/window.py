"""Exact windows of keys on the block-sparse kernel, which itself masks future keys alone.

A window's near end is what the kernel masks. Its far end is the same in reversed order, where the
rows before a key become those after it. So a window is two calls that share an edge: keys from the
edge of a tile on and, reversed, those before it. The edge of a query tile lies between the far ends
of its last row (every row's window holds the keys from there on) and its first row itself (no key
before it is in any row's future), so that a window must be as long as two tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockSparseIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.index import ALIGNMENT, num_q_blocks
from pallas_kernels.common.tiling import cdiv, round_up


class Tiling(NamedTuple):
    """How the kernel runs."""

    block_q: int
    block_kv: int
    implementation: Implementation | None


class Part(NamedTuple):
    """Attention to some of the keys.

    Attributes:
        out: output.
        lse: log-sum-exp of the scores; -inf for a row that sees none of the keys.
        executed: (query, key) pairs that the kernel's tiles hold.
    """

    out: Float[Array, "batch q_len heads head_dim"]
    lse: Float[Array, "batch heads q_len"]
    executed: Float[Array, "batch heads"]


def first_keys_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    size: int,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    tiling: Tiling,
) -> Part:
    """Causal attention to the first `size` keys."""
    block_q, block_kv, _ = tiling
    first = q_offset + jnp.arange(num_q_blocks(q.shape[1], block_q))[None, :] * block_q
    tiles = cdiv(min(size, k.shape[1]), block_kv)
    count = jnp.clip(-(-(first + block_q) // block_kv), 0, tiles)
    count = jnp.where(first < lengths[:, None], count, 0)
    index = _tiles_below(count * block_kv, count, q.shape[2], tiles, tiling)
    return _attend(q, k, v, index, jnp.minimum(lengths, size), q_offset, tiling)


def window_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    first: int,
    size: int,
    stride: int,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    tiling: Tiling,
) -> list[Part]:
    """Attention to the keys at distances `first + n * stride`, 0 <= n < `size`, in disjoint parts.

    Args:
        q: queries.
        k: keys.
        v: values.
        first: smallest distance.
        size: number of distances.
        stride: step between distances.
        lengths: real keys of each batch row; may be 0 or less.
        q_offset: position of the first query among the keys; may be negative.
        tiling: how the kernel runs.

    Raises:
        ValueError: the window is too short for the tiles.
    """
    block_q, block_kv, _ = tiling
    batch, q_len, heads, _ = q.shape
    keys = cdiv(k.shape[1], stride)
    everything = size >= keys
    if not everything and size < block_q + block_kv - 1:
        raise ValueError(
            f"a window must hold at least {block_q + block_kv - 1} keys (query tiles of {block_q} "
            f"rows and key tiles of {block_kv}), got {size}: take at least "
            f"{(block_q + block_kv - 1) * stride} tokens"
        )
    if everything:
        size = keys + block_q + block_kv

    # Query i sees keys of the residue of its own position, less `first`. Rows move up to a multiple
    # of the stride, so that row m of every subsequence is at position `offset + m`.
    q_offset = q_offset - first
    moved = q_offset % stride
    offset = q_offset // stride
    rows = round_up(cdiv(q_len + stride - 1, stride), block_q)
    capacity = round_up(max(keys, rows), ALIGNMENT)
    q = jnp.zeros((batch, rows * stride, *q.shape[2:]), q.dtype).at[:, :q_len].set(q)
    q = _split(jnp.roll(q, moved, axis=1), stride)
    padding = ((0, 0), (0, capacity * stride - k.shape[1]), (0, 0), (0, 0))
    k, v = (_split(jnp.pad(x, padding), stride) for x in (k, v))

    residue = jnp.arange(stride)[None, :]
    # A subsequence without keys has no row at or after key 0, so that its length does not matter.
    stored = jnp.maximum(-((residue - lengths[:, None]) // stride), 1).reshape(-1)
    begin = offset + jnp.arange(rows // block_q)[None, :] * block_q
    real = stride * begin[None] + residue[..., None] < (lengths - first)[:, None, None]
    real = real.reshape(-1, begin.shape[1])
    top = -(-(begin + block_q) // ALIGNMENT) * ALIGNMENT
    near = jnp.minimum((top - (begin + block_q - size)) // block_kv, -(-top // block_kv))
    near = jnp.maximum(near, 0)
    index = _tiles_below(
        top, jnp.where(real, near, 0), heads, cdiv(min(size, keys + block_q) + 8, block_kv), tiling
    )
    parts = [_attend(q, k, v, index, stored, offset, tiling)]

    if not everything:
        edge = top - near * block_kv
        far = -((jnp.maximum(begin - size + 1, 0) - edge) // block_kv)
        far = jnp.where(real, jnp.maximum(far, 0), 0)
        index = _tiles_below(
            (capacity - edge + far * block_kv)[:, ::-1], far[:, ::-1], heads,
            cdiv(block_q + block_kv, block_kv), tiling,
        )  # fmt: skip
        q, k, v = (x[:, ::-1] for x in (q, k, v))
        whole = jnp.full_like(stored, capacity)
        offset = capacity - 1 + size - offset - rows
        part = _attend(q, k, v, index, whole, offset, tiling)
        parts.append(Part(part.out[:, ::-1], part.lse[:, :, ::-1], part.executed))

    take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, moved, q_len, axis)
    return [
        Part(
            take(_join(part.out, stride, 1), 1),
            take(_join(part.lse, stride, 2), 2),
            jnp.sum(part.executed.reshape(batch, stride, heads), axis=1),
        )
        for part in parts
    ]


def _split(x: Array, stride: int) -> Array:
    """[batch, rows * stride, ...] as [batch * stride, rows, ...], by position modulo the stride."""
    x = x.reshape(x.shape[0], x.shape[1] // stride, stride, *x.shape[2:])
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])


def _join(x: Array, stride: int, axis: int) -> Array:
    """Undoes `_split`, where rows are at `axis`."""
    x = x.reshape(x.shape[0] // stride, stride, *x.shape[1:])
    x = jnp.moveaxis(x, 1, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _tiles_below(
    top: Int[Array, "#batch num_q_blocks"],
    count: Int[Array, "batch num_q_blocks"],
    heads: int,
    capacity: int,
    tiling: Tiling,
) -> BlockSparseIndex:
    """The index of query tiles that visit `count` adjoining key tiles, the last ending at `top`."""
    block_q, block_kv, _ = tiling
    batch, tiles = count.shape
    spread = lambda x: jnp.broadcast_to(x[:, None, :].astype(jnp.int32), (batch, heads, tiles))
    entries = -block_kv * (1 + jnp.arange(capacity, dtype=jnp.int32))
    return BlockSparseIndex(
        entries=jnp.broadcast_to(entries, (batch, heads, capacity)),
        begin=jnp.zeros((batch, heads, tiles), jnp.int32),
        count=spread(count),
        origin=spread(top),
        columns=jnp.zeros((batch, heads, 0), jnp.int32),
        column_count=jnp.zeros((batch, heads), jnp.int32),
        block_q=block_q,
        block_kv=block_kv,
    )


def _attend(q, k, v, index, lengths, q_offset, tiling: Tiling) -> Part:
    out, lse = block_sparse_attention(
        q, k, v, index, lengths=lengths, q_offset=q_offset, return_residuals=True,
        implementation=tiling.implementation,
    )  # fmt: skip
    tiles = jnp.sum(index.count.astype(jnp.float32), axis=2)
    return Part(out, lse, tiles * (tiling.block_q * tiling.block_kv))
