"""Queries and keys with the structure of real heads: sinks, columns, and scattered slashes."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.common.config import RopeConfig
from models.common.rope import apply_rope, rotation_tables

# A shared direction this strong gives the nearest keys most of the weight, with side bands at the
# distances where the rotations of some coordinates return; weaker ones leave random scores.
_LINE_STRENGTH = 1.5
_COLUMNS = 256


def structured_qkv(
    *, length: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype, seed: int
) -> tuple[
    Float[Array, "1 length heads head_dim"],
    Float[Array, "1 length kv_heads head_dim"],
    Float[Array, "1 length kv_heads head_dim"],
]:
    """Draws one layer's inputs.

    Every head adds a fixed vector to its noise before the rotary embedding, so that scores depend
    on the distance, which makes slashes; random keys, the first ones among them, point along all
    queries, which makes columns.

    Args:
        length: tokens.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        dtype: of the arrays.
        seed: of the draw.
    """
    rope = RopeConfig(theta=500_000.0, rotary_dim=head_dim, interleaved=False, scaling=None)
    rng = np.random.default_rng(seed)
    columns = np.union1d(np.arange(4), rng.choice(length, min(_COLUMNS, length), replace=False))

    @jax.jit
    def draw(key):
        q_key, k_key, v_key, line_key = jax.random.split(key, 4)
        group = num_heads // num_kv_heads
        line = _LINE_STRENGTH * jax.random.normal(line_key, (num_kv_heads, head_dim))
        q = jax.random.normal(q_key, (1, length, num_heads, head_dim))
        k = jax.random.normal(k_key, (1, length, num_kv_heads, head_dim))
        v = jax.random.normal(v_key, (1, length, num_kv_heads, head_dim))
        q = q + jnp.repeat(line, group, axis=0)[None, None]
        boost = jnp.zeros((length,)).at[columns].set(1.0)
        k = k + line[None, None] * (1.0 + boost)[None, :, None, None]
        positions = jnp.arange(length, dtype=jnp.int32)[None, :]
        cos, sin = rotation_tables(rope, positions, jnp.array([length]))
        q = apply_rope(q, cos, sin, interleaved=False)
        k = apply_rope(k, cos, sin, interleaved=False)
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    return draw(jax.random.key(seed))
