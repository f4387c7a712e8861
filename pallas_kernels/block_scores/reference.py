"""The definition: every row's softmax in full, then the sums over tiles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_scores(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    means: Float[Array, "batch kv_heads num_means head_dim"],
    *,
    past: Int[Array, " tiles"],
    real_rows: Int[Array, " batch"],
    tile_rows: int,
) -> Float[Array, "batch kv_heads lists tiles num_means"]:
    """Scores; memory is rows * num_means for each head."""
    rows, head_dim = q.shape[1], q.shape[5]
    q, means = q.astype(jnp.float32), means.astype(jnp.float32)
    scores = jnp.einsum("brklmd,bkjd->brklmj", q, means, precision="highest") * head_dim**-0.5
    row = jnp.arange(rows)
    seen = jnp.arange(means.shape[2])[None, :] < past[row // tile_rows][:, None]
    visible = seen[None] & (row[None, :] < real_rows[:, None])[:, :, None]
    visible = visible[:, :, None, None, None, :]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    weights = jnp.sum(jnp.where(visible, weights, 0.0), axis=4)
    weights = jnp.pad(weights, ((0, 0), (0, -rows % tile_rows), *((0, 0),) * 3))
    tiles = weights.reshape(weights.shape[0], -1, tile_rows, *weights.shape[2:])
    return jnp.sum(tiles, axis=2).transpose(0, 2, 3, 1, 4)
