"""Some tiles at a time, so that no more than a bounded number of softmax weights is held."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.online_softmax import MASK_VALUE
from pallas_kernels.common.tiling import cdiv, round_up

# Softmax weights of one step over all heads: 16 MB, so that they stay in a GPU's cache.
_ELEMENTS = 2**22


def block_scores(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    means: Float[Array, "batch kv_heads num_means head_dim"],
    *,
    past: Int[Array, " tiles"],
    real_rows: Int[Array, " batch"],
    tile_rows: int,
) -> Float[Array, "batch kv_heads lists tiles num_means"]:
    """Scores; memory is that of the result and of one step."""
    batch, rows, kv_heads, lists, members, head_dim = q.shape
    tiles, num_means = past.shape[0], means.shape[2]
    per_tile = batch * kv_heads * lists * members * tile_rows * num_means
    step = max(1, min(tiles, _ELEMENTS // per_tile))
    padded = round_up(tiles, step)
    q = jnp.pad(q, ((0, 0), (0, padded * tile_rows - rows), *((0, 0),) * 4))
    past = jnp.pad(past, (0, padded - tiles))
    # 16-bit numbers have exact products; float32 must not be shortened.
    precision = "highest" if q.dtype == jnp.float32 else "default"
    mean = jnp.arange(num_means)

    def some_tiles(number):
        first = number * step * tile_rows
        part = jax.lax.dynamic_slice_in_dim(q, first, step * tile_rows, axis=1)
        seen = jax.lax.dynamic_slice_in_dim(past, number * step, step)
        scores = jnp.einsum(
            "brklmd,bkjd->bklmrj", part, means, precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = (scores * head_dim**-0.5).reshape(
            batch, kv_heads, lists, members, step, tile_rows, num_means
        )
        row = first + jnp.arange(step * tile_rows).reshape(step, tile_rows)
        real = row[None] < real_rows[:, None, None]
        visible = (mean[None, :] < seen[:, None])[None, :, None, :] & real[..., None]
        visible = visible[:, None, None, None]
        scores = jnp.where(visible, scores, MASK_VALUE)
        best = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(scores - best), 0.0)
        # A visible maximum weighs 1, so only an empty sum is below 1.
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
        return jnp.sum(weights, axis=(3, 5))

    scores = jax.lax.map(some_tiles, jnp.arange(cdiv(tiles, step)))
    # [steps, batch, kv_heads, lists, tiles of a step, num_means]
    scores = jnp.moveaxis(scores, 0, 3)
    return scores.reshape(batch, kv_heads, lists, padded, num_means)[:, :, :, :tiles]
