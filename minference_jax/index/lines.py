"""Which columns and distances a head takes: A-shape, tri-shape and vertical-slash."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.index.select import top_k_mask
from minference_jax.patterns import HeadPatterns, Kind
from pallas_kernels.line_scores import line_scores

# Queries that lines are estimated from (paper, Algorithm 2).
LAST_Q = 64


def last_query_scores(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, "*rows"],
    last_q: int,
) -> tuple[Float[Array, "batch heads kv_len"], Float[Array, "batch heads kv_len"]]:
    """Column and diagonal sums of the softmax of each row's last real queries (Algorithm 2)."""
    last, first = last_queries(q, lengths=lengths, q_offset=q_offset, last_q=last_q)
    # The kernel takes no more queries at once; sums of more are sums of theirs.
    parts = [
        line_scores(last[:, at : at + LAST_Q], k, first=first + at, lengths=lengths)
        for at in range(0, last.shape[1], LAST_Q)
    ]
    return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts)


def last_queries(
    q: Float[Array, "batch q_len heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, "*rows"],
    last_q: int,
) -> tuple[Float[Array, "batch last_q heads head_dim"], Int[Array, " batch"]]:
    """The last real queries of each row and the position of the first of them.

    Where there are fewer than `last_q`, all queries; those at or beyond `lengths` are not real.
    """
    q_len = q.shape[1]
    last_q = min(last_q, q_len)
    start = jnp.clip(lengths - q_offset - last_q, 0, q_len - last_q)
    take = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, last_q)
    return jax.vmap(take)(q, start), q_offset + start


def choose_lines(
    vertical: Float[Array, "batch heads kv_len"],
    slash: Float[Array, "batch heads kv_len"],
    patterns: HeadPatterns,
    *,
    lengths: Int[Array, " batch"],
) -> tuple[Bool[Array, "batch heads kv_len"], Bool[Array, "batch heads kv_len"]]:
    """Applies every head's budget: which key columns and which distances it visits.

    The first `sink_size` columns and `window_size` distances come first, inside the budgets; an
    A-shape is a head whose budgets end there. Dense and block-sparse heads get neither.

    Args:
        vertical: score of each column.
        slash: score of each distance.
        patterns: one layer's patterns.
        lengths: real keys of each batch row; columns and distances from there on are never taken.

    Returns:
        Masks over columns and over distances.
    """
    columns, distances = _budgets(patterns)
    position = jnp.arange(vertical.shape[-1])

    def choose(scores, forced, budget, length):
        scores = jnp.where(position < forced, jnp.inf, scores)
        return top_k_mask(jnp.where(position < length, scores, -1.0), budget)

    # Columns and distances together: half as many passes, each over twice the heads.
    scores = jnp.stack([vertical, slash], axis=1)
    forced = jnp.stack([patterns.sink_size, patterns.window_size])
    budgets = jnp.stack([columns, distances])
    over_heads = jax.vmap(jax.vmap(choose, in_axes=(0, 0, 0, None)), in_axes=(0, 0, 0, None))
    chosen = jax.vmap(over_heads, in_axes=(0, None, None, 0))(scores, forced, budgets, lengths)
    return chosen[:, 0], chosen[:, 1]


def forced_lines(
    patterns: HeadPatterns, kv_len: int, *, lengths: Int[Array, " batch"]
) -> tuple[Bool[Array, "batch heads kv_len"], Bool[Array, "batch heads kv_len"]]:
    """What `choose_lines` takes in a layer without vertical-slash heads: the first of each."""
    position = jnp.arange(kv_len)[None, None, :]
    real = position < lengths[:, None, None]
    columns, distances = _budgets(patterns)
    return real & (position < columns[None, :, None]), real & (position < distances[None, :, None])


def _budgets(patterns: HeadPatterns) -> tuple[Int[Array, " heads"], Int[Array, " heads"]]:
    """How many columns and how many distances each head takes."""
    kind = patterns.kind
    searched = kind == Kind.VERTICAL_SLASH
    lined = searched | (kind == Kind.A_SHAPE) | (kind == Kind.TRI_SHAPE)
    columns = jnp.where(searched, patterns.vertical_size, patterns.sink_size)
    distances = jnp.where(searched, patterns.slash_size, patterns.window_size)
    return jnp.where(lined, columns, 0), jnp.where(lined, distances, 0)
