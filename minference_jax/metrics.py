"""How near sparse attention comes to dense: functions of arrays, in float32, streamed.

Density, the share of causal pairs that an index visits, is `index.density` and
`index.visited_pairs`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse_attention.index import (
    BlockSparseIndex,
    resolve_lengths,
    visited_keys,
)
from pallas_kernels.common.online_softmax import MASK_VALUE

# Scores held at a time; some heads, then some rows at once while they stay below it.
_ELEMENTS = 2**27

# Distributions over the vocabulary compared at a time.
_POSITIONS = 64


def attention_recall(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
    rows: Int[Array, " rows"] | None = None,
) -> Float[Array, "batch heads rows"]:
    """Share of each row's attention mass that lies inside what the index visits.

    Args:
        q: queries.
        k: keys; kv_heads divides heads.
        index: what each query tile visits.
        lengths: real keys of each batch row, kv_len if None.
        q_offset: position of the first query among the keys, kv_len - q_len if None.
        rows: the query rows to look at; None for all.

    Returns:
        0 to 1 for each of these rows; NaN for a row at or beyond its batch row's length.
    """
    batch, q_len, heads, _ = q.shape
    kv_len, kv_heads = k.shape[1:3]
    lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
    part = index.block_q // index.halves
    # Rows that visit the same keys go together; rows picked out go one by one.
    if rows is None:
        together = part
        number = jnp.arange(-(-q_len // part) * part).reshape(-1, part)
    else:
        together = 1
        number = rows[:, None]

    def one_head(at):
        b, h = at
        lists = jax.tree.map(lambda x: x[b, h], index)
        keys = k[b, :, h // (heads // kv_heads)]
        queries = q[b, :, h]
        take = lambda number: queries[jnp.minimum(number, q_len - 1)]
        mass = lambda number: _mass_inside(
            take(number), keys, lists, number, lengths[b], q_offset, part
        )
        return jax.lax.map(mass, number, batch_size=rows_at_once).reshape(-1)

    pairs = (jnp.repeat(jnp.arange(batch), heads), jnp.tile(jnp.arange(heads), batch))
    at_once = max(1, min(batch * heads, _ELEMENTS // (together * kv_len)))
    rows_at_once = max(1, min(len(number), _ELEMENTS // (together * kv_len * at_once)))
    recall = jax.lax.map(one_head, pairs, batch_size=at_once)
    recall = recall.reshape(batch, heads, -1)
    return recall[:, :, :q_len] if rows is None else recall


def _mass_inside(q, k, lists, number, length, q_offset, part):
    """Mass [n] inside what rows `number` [n] of one head visit; they visit the same keys."""
    tile, half = jnp.divmod(number[0] // part, lists.halves)
    visited = visited_keys(
        lists.entries, lists.begin[tile], lists.count[tile],
        lists.origin[tile] + half * lists.later()[tile], lists.columns, lists.column_count,
        kv_len=k.shape[0], block_q=lists.block_q, block_kv=lists.block_kv,
    )  # fmt: skip
    position = q_offset + number
    key = jnp.arange(k.shape[0])
    causal = (key[None, :] <= position[:, None]) & (key < length)[None, :]
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.dot(q, k.T, precision="highest") * q.shape[1] ** -0.5
    scores = jnp.where(causal, scores, MASK_VALUE)
    weights = jnp.where(causal, jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True)), 0.0)
    inside = jnp.sum(jnp.where(visited[None, :], weights, 0.0), axis=1)
    return jnp.where(position < length, inside / jnp.sum(weights, axis=1), jnp.nan)


def lse_recall(
    lse: Float[Array, "*shape"], dense_lse: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Attention mass inside the visited set, from log-sum-exps alone: exp(lse - dense_lse).

    What `attention_recall` computes, for all rows, at the price of one run of the kernel for each
    (`block_sparse_attention(..., return_residuals=True)`), with its rounding.

    Args:
        lse: log-sum-exp of each row's scaled scores over what it visits; -inf if it visits nothing.
        dense_lse: the same over all keys.
    """
    return jnp.exp(jnp.minimum(lse - dense_lse, 0.0))


class OutputError(NamedTuple):
    """How far an attention output is from another, for each head."""

    relative: Float[Array, "batch heads"]
    far_off: Float[Array, "batch heads"]


def output_error(
    out: Float[Array, "batch q_len heads head_dim"],
    dense: Float[Array, "batch q_len heads head_dim"],
    *,
    real: Bool[Array, "batch q_len"] | None = None,
    threshold: float = 5e-3,
) -> OutputError:
    """Compares attention outputs over the real rows.

    Args:
        out: output of the sparse attention.
        dense: output of dense attention.
        real: which rows count; None for all.
        threshold: distance from which an element is far off (the original's search: 5e-3).

    Returns:
        `relative`, the norm of the difference over the norm of `dense`; and `far_off`, the share of
        elements that differ by more than `threshold`. Both 0 where no row is real.
    """
    real = jnp.ones(out.shape[:2], bool) if real is None else real
    counts = real[:, :, None, None]
    dense = dense.astype(jnp.float32)
    difference = out.astype(jnp.float32) - dense
    total = lambda x: jnp.sum(jnp.where(counts, x, 0.0), axis=(1, 3))
    squared, whole = total(difference**2), total(dense**2)
    elements = jnp.maximum(jnp.sum(real, axis=1), 1)[:, None] * out.shape[3]
    return OutputError(
        relative=jnp.sqrt(squared / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)),
        far_off=total((jnp.abs(difference) > threshold).astype(jnp.float32)) / elements,
    )


def next_token_kl(
    logits: Float[Array, "*positions vocab"], dense_logits: Float[Array, "*positions vocab"]
) -> Float[Array, "*positions"]:
    """Kullback-Leibler divergence KL(dense || other) of next-token distributions, in nats."""

    def one(pair):
        other, dense = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in pair)
        return jnp.sum(jnp.exp(dense) * (dense - other))

    # Rounding may put the divergence of equal distributions below zero.
    return jnp.maximum(_by_position(one, logits, dense_logits), 0.0)


def top1_agreement(
    logits: Float[Array, "*positions vocab"], dense_logits: Float[Array, "*positions vocab"]
) -> Bool[Array, "*positions"]:
    """Whether the likeliest next token is the same."""
    return jnp.argmax(logits, axis=-1) == jnp.argmax(dense_logits, axis=-1)


def _by_position(one, *arrays):
    shape = arrays[0].shape[:-1]
    flat = tuple(x.reshape(-1, x.shape[-1]) for x in arrays)
    return jax.lax.map(one, flat, batch_size=min(_POSITIONS, flat[0].shape[0])).reshape(shape)
