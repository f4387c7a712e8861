"""Two streaming passes over the keys in chunks: row statistics, then the sums."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.online_softmax import LOG2E, MASK_VALUE
from pallas_kernels.common.tiling import round_up

# Keys of one step, whatever kv_len is: padding a prompt then never changes the order of a sum.
_CHUNK = 2048


def line_scores(
    q: Float[Array, "batch last_q heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    first: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch heads kv_len"], Float[Array, "batch heads kv_len"]]:
    """Column sums and diagonal sums; memory is last_q * chunk for each head."""
    batch, last_q, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    chunk = _CHUNK
    padded = round_up(kv_len, chunk)
    k = jnp.pad(k, ((0, 0), (0, padded - kv_len), (0, 0), (0, 0)))
    q = q.astype(jnp.float32).reshape(batch, last_q, kv_heads, heads // kv_heads, head_dim)
    one_group = jax.vmap(_one_head, in_axes=(1, None, None, None, None))
    one_row = jax.vmap(one_group, in_axes=(1, 1, None, None, None))
    every = jax.vmap(one_row, in_axes=(0, 0, 0, 0, None))
    vertical, slash = every(q, k, first, lengths, chunk)
    shape = (batch, heads, padded)
    return vertical.reshape(shape)[..., :kv_len], slash.reshape(shape)[..., :kv_len]


def _one_head(q, k, first, length, chunk):
    """Q [last_q, head_dim], k [padded, head_dim]: sums by column and by distance, both [padded]."""
    last_q, head_dim = q.shape
    padded = k.shape[0]
    scale = head_dim**-0.5 * LOG2E
    # 16-bit inputs are exact in the short float that a GPU multiplies by default; float32 is not.
    precision = "highest" if k.dtype == jnp.float32 else "default"
    position = first + jnp.arange(last_q)

    def scores(start):
        keys = jax.lax.dynamic_slice_in_dim(k, start, chunk).astype(jnp.float32)
        key = start + jnp.arange(chunk)
        visible = (key[None, :] <= position[:, None]) & (position < length)[:, None]
        products = jnp.dot(q, keys.T, precision=precision)
        return jnp.where(visible, products * scale, MASK_VALUE), visible

    def statistics(state, start):
        m, l = state
        s, visible = scores(start)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        weights = jnp.where(visible, jnp.exp2(s - m_new[:, None]), 0.0)
        return (m_new, l * jnp.exp2(m - m_new) + jnp.sum(weights, axis=1)), None

    # The distance of (row r, key start + t) is first - start - (chunk - 1) + r + (chunk - 1 - t):
    # shifting the flipped row r by r places lines the diagonals up in columns.
    margin = chunk + last_q

    def sums(slash, start):
        s, visible = scores(start)
        weights = jnp.where(visible, jnp.exp2(s - m[:, None]) * inverse[:, None], 0.0)
        width = chunk + last_q
        skewed = jnp.pad(weights[:, ::-1], ((0, 0), (0, last_q)))
        skewed = skewed.reshape(-1)[: last_q * (width - 1)].reshape(last_q, width - 1)
        at = first - start - (chunk - 1) + margin
        window = jax.lax.dynamic_slice_in_dim(slash, at, width - 1)
        slash = jax.lax.dynamic_update_slice_in_dim(
            slash, window + jnp.sum(skewed, axis=0), at, axis=0
        )
        return slash, jnp.sum(weights, axis=0)

    # Chunks after the last query hold no visible key, so their window would lie before distance 0.
    starts = jnp.arange(0, padded, chunk)
    init = (jnp.full((last_q,), MASK_VALUE), jnp.zeros((last_q,)))
    (m, l), _ = jax.lax.scan(statistics, init, starts)
    inverse = jnp.where(l > 0.0, 1.0 / jnp.where(l > 0.0, l, 1.0), 0.0)
    slash, vertical = jax.lax.scan(sums, jnp.zeros((padded + 2 * margin,)), starts)
    return vertical.reshape(padded), slash[margin : margin + padded]
