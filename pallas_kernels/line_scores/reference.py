"""The definition: the last queries' softmax in full, then its column and diagonal sums."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def line_scores(
    q: Float[Array, "batch last_q heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    first: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch heads kv_len"], Float[Array, "batch heads kv_len"]]:
    """Column sums and diagonal sums; memory is last_q * kv_len for each head."""
    _, last_q, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    k = jnp.repeat(k.astype(jnp.float32), heads // kv_heads, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k, precision="highest")
    position = first[:, None] + jnp.arange(last_q)[None, :]
    distance = position[:, :, None] - jnp.arange(kv_len)[None, None, :]
    row_real = position < lengths[:, None]
    visible = ((distance >= 0) & row_real[:, :, None])[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, -1e30), axis=-1)
    weights = jnp.where(visible, weights, 0.0)

    def diagonals(weights, distance):
        return jnp.zeros(kv_len).at[jnp.clip(distance, 0)].add(weights)

    slash = jax.vmap(jax.vmap(diagonals, in_axes=(0, None)))(weights, distance)
    return jnp.sum(weights, axis=2), slash
