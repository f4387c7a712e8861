"""What a device does for its part of a prompt: two chunks of queries against all keys.

Runs inside `shard_map`. Rows lie in `balanced_order`: the first half of a device's queries is an
early chunk, the second half a late one. Each is attended to like a chunk of a chunked prefill.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive import AdaptiveAttention, IndexedAttention, WithColumns
from minference_jax.attention import DenseAttention, SparseAttention
from minference_jax.index.lines import LAST_Q
from minference_jax.patterns import Kind
from pallas_kernels.line_scores import line_scores


def why_not_by_parts(attention: Any) -> str | None:
    """Why a device cannot find what its part of a prompt visits; None if it can."""
    if isinstance(attention, (SparseAttention, DenseAttention)):
        return None
    if not isinstance(attention, AdaptiveAttention):
        return f"{type(attention).__name__} needs the queries of the whole prompt in order"
    estimator = attention.estimator
    blocks = estimator.blocks if isinstance(estimator, WithColumns) else estimator
    if getattr(blocks, "by_tile", False):
        return None
    return f"{type(blocks).__name__} decides for a query tile by queries of others"


def attend_by_parts(
    attention: SparseAttention | DenseAttention | AdaptiveAttention,
    q: Float[Array, "batch rows heads head_dim"],
    k: Float[Array, "batch rows kv_heads head_dim"],
    v: Float[Array, "batch rows kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    axis: str,
) -> list[tuple[Float[Array, "batch chunk heads head_dim"], Any, Int[Array, ""]]]:
    """Output, index and offset of both chunks of this device.

    Communicates all keys and values, the last queries, and with `dense_above` two numbers of each
    head of `SparseAttention`.

    Args:
        attention: of one layer and of this device's heads.
        q: this device's queries.
        k: this device's keys.
        v: their values.
        lengths: real keys of each prompt.
        axis: the mesh axis over which prompts are split.
    """
    k, v = (gather_rows(x, axis) for x in (k, v))
    offsets = _offsets(q.shape[1] // 2, axis)
    attentions = _of_chunks(attention, q, k, lengths, offsets, axis)
    chunks = zip(attentions, jnp.split(q, 2, axis=1), offsets, strict=True)
    return [
        (*chosen.attend(rows, k, v, lengths=lengths, q_offset=offset), offset)
        for chosen, rows, offset in chunks
    ]


def _of_chunks(attention, q, k, lengths, offsets, axis):
    """The attention of each chunk, with what it must know of the rest of the prompt."""
    if isinstance(attention, SparseAttention):
        tiles = jnp.arange(q.shape[1] // 2 // attention.block_q) * attention.block_q
        searched = jnp.any(attention.patterns.kind == Kind.VERTICAL_SLASH)
        index = attention.estimate(
            q, k, lengths=lengths, line_scores=_line_scores(q, k, lengths, axis, searched),
            first=jnp.concatenate([offset + tiles for offset in offsets]),
            total=lambda of_heads: jax.lax.psum(of_heads, axis),
        )  # fmt: skip
        return [IndexedAttention(x, attention.implementation) for x in _halves(index)]
    if isinstance(attention, AdaptiveAttention) and isinstance(attention.estimator, WithColumns):
        scores = _line_scores(q, k, lengths, axis, jnp.bool(True))
        estimator = jax.tree_util.Partial(attention.estimator, line_scores=scores)
        attention = dataclasses.replace(attention, estimator=estimator)
    return [attention, attention]


def _halves(index):
    """The index of the first half of the query tiles, and of the second."""
    of_tiles = {"begin": index.begin, "count": index.count, "origin": index.origin}
    if index.shift is not None:
        of_tiles["shift"] = index.shift
    halves = {name: jnp.split(x, 2, axis=2) for name, x in of_tiles.items()}
    take = lambda half: {name: x[half] for name, x in halves.items()}
    return [dataclasses.replace(index, **take(half)) for half in range(2)]


def gather_rows(x, axis):
    """All rows [batch, all rows, ...], in the order of the prompt."""
    parts = jax.lax.axis_size(axis)
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    chunks = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    both = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return both.reshape(x.shape)


def _offsets(chunk, axis):
    """Positions of the first rows of this device's two chunks."""
    device = jax.lax.axis_index(axis)
    return device * chunk, (2 * jax.lax.axis_size(axis) - 1 - device) * chunk


def _line_scores(q, k, lengths, axis, wanted):
    """`last_query_scores` of the whole prompt, by all devices alike; 0 where not `wanted`."""
    last, first = gather_last_queries(q, k.shape[1], lengths, axis, LAST_Q)
    nothing = jnp.zeros((q.shape[0], q.shape[2], k.shape[1]), jnp.float32)
    return jax.lax.cond(
        wanted,
        lambda: line_scores(last, k, first=first, lengths=lengths),
        lambda: (nothing, nothing),
    )


def gather_last_queries(q, length, lengths, axis, last_q):
    """`lines.last_queries` of the whole prompt: each device gives the rows that it holds."""
    chunk = q.shape[1] // 2
    last_q = min(last_q, length)
    first = jnp.clip(lengths - last_q, 0, length - last_q)
    position = first[:, None] + jnp.arange(last_q)[None, :]
    early, late = _offsets(chunk, axis)
    in_chunk = lambda offset: (position >= offset) & (position < offset + chunk)
    row = jnp.where(in_chunk(early), position - early, position - late + chunk)
    rows = jnp.take_along_axis(q, jnp.clip(row, 0, 2 * chunk - 1)[:, :, None, None], axis=1)
    held = (in_chunk(early) | in_chunk(late))[:, :, None, None]
    return jax.lax.psum(jnp.where(held, rows, 0), axis), first
