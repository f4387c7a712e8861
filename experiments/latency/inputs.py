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
    key: Array, *, length: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[
    Float[Array, "1 length heads head_dim"],
    Float[Array, "1 length kv_heads head_dim"],
    Float[Array, "1 length kv_heads head_dim"],
]:
    """Draws one layer's inputs; jittable, with the sizes static.

    Every head adds a fixed vector to its noise before the rotary embedding, so that scores depend
    on the distance, which makes slashes; random keys, the first ones among them, point along all
    queries, which makes columns.

    Args:
        key: of the draw.
        length: tokens.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        dtype: of the arrays.
    """
    rope = RopeConfig(theta=500_000.0, rotary_dim=head_dim, interleaved=False, scaling=None)
    group = num_heads // num_kv_heads
    columns = np.random.default_rng(0).choice(length, min(_COLUMNS, length), replace=False)
    columns = np.union1d(np.arange(min(4, length)), columns)
    boost = jnp.zeros((length,)).at[columns].set(1.0)[None, :, None, None]
    positions = jnp.arange(length, dtype=jnp.int32)[None, :]
    cos, sin = rotation_tables(rope, positions, jnp.array([length]))

    def one_group(key):
        q_key, k_key, v_key, line_key = jax.random.split(key, 4)
        line = _LINE_STRENGTH * jax.random.normal(line_key, (head_dim,))[None, None, None, :]
        q = jax.random.normal(q_key, (1, length, group, head_dim)) + line
        k = jax.random.normal(k_key, (1, length, 1, head_dim)) + line * (1.0 + boost)
        v = jax.random.normal(v_key, (1, length, 1, head_dim))
        q, k = (apply_rope(x, cos, sin, interleaved=False) for x in (q, k))
        return tuple(x.astype(dtype) for x in (q, k, v))

    # One group of heads after another: float32 for all of them would not fit at a million tokens.
    arrays = jax.lax.map(one_group, jax.random.split(key, num_kv_heads))
    heads_last = lambda x: jnp.moveaxis(x, 0, 2).reshape(1, length, -1, head_dim)
    q, k, v = (heads_last(x) for x in arrays)
    return q, k, v
