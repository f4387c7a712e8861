"""Queries and keys whose attention is sparse in blocks, at any length: what estimates are timed on.

Means over blocks of plain noise are alike, so that every estimator would keep everything.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

from pallas_kernels.common.tiling import cdiv

# Keys and queries that belong together.
_BLOCK = 128
# Topics at 128K tokens; they grow with the square root of the length.
_TOPICS, _AT = 64, 131072
# Length of a topic's vector, beside noise of 1 in each coordinate.
_STRENGTH = 8.0
# Standard deviation of what the first and the last head's queries give to topics at 128K tokens, in
# nats. It grows with the length too, so that longer prompts are sparser, as real ones are.
_LEAST, _MOST, _GROWTH = 1.2, 4.0, 1 / 6
# First keys that every query likes, and by how many nats.
_SINKS, _SINK = 4, 8.0


def planted_qkv(
    key: Array, length: int, *, heads: int, kv_heads: int, head_dim: int
) -> tuple[
    BFloat16[Array, "1 length heads head_dim"],
    BFloat16[Array, "1 length kv_heads head_dim"],
    BFloat16[Array, "1 length kv_heads head_dim"],
]:
    """Queries, keys and values; jittable, one head at a time.

    Every block of 128 keys speaks of one of T topics: its keys are the topic's vector plus noise.
    The queries of a tile of 128 rows like each topic by a normal number of nats; its standard
    deviation grows over the heads, from heads that look at many topics to heads that look at few.
    Each row departs from its tile by half as much again. The first keys are a sink.

    Args:
        key: random key.
        length: tokens.
        heads: query heads.
        kv_heads: key/value heads; divides heads.
        head_dim: numbers of a head.
    """
    topic_key, block_key, key_key, query_key, value_key = jax.random.split(key, 5)
    num_blocks, topics = cdiv(length, _BLOCK), max(4, round(_TOPICS * (length / _AT) ** 0.5))
    sink = jnp.zeros((1, head_dim)).at[0, 0].set(1.0)
    rows = lambda x: jnp.repeat(x, _BLOCK, axis=0)[:length]
    noise = lambda key: jax.random.normal(key, (length, head_dim), jnp.bfloat16)

    def keys_of(number):
        at = [jax.random.fold_in(x, number) for x in (topic_key, block_key, key_key)]
        topic = jax.random.normal(at[0], (topics, head_dim)).at[:, 0].set(0.0)
        topic *= _STRENGTH / jnp.linalg.norm(topic, axis=1, keepdims=True)
        k = rows(topic[jax.random.randint(at[1], (num_blocks,), 0, topics)].astype(jnp.bfloat16))
        first = jnp.arange(length)[:, None] < _SINKS
        return k + noise(at[2]) + jnp.where(first, _SINK * head_dim**0.5 * sink, 0).astype(k.dtype)

    def queries_of(number):
        spread = _LEAST + (_MOST - _LEAST) * number / max(heads - 1, 1)
        scale = spread * (length / _AT) ** _GROWTH * head_dim**0.5 / _STRENGTH
        tile_key, row_key = jax.random.split(jax.random.fold_in(query_key, number))
        tiles = jax.random.normal(tile_key, (num_blocks, head_dim), jnp.bfloat16)
        return scale.astype(jnp.bfloat16) * (rows(tiles) + 0.5 * noise(row_key)) + sink.astype(
            jnp.bfloat16
        )

    values_of = lambda number: noise(jax.random.fold_in(value_key, number))
    over = lambda one, number: jnp.moveaxis(jax.lax.map(one, jnp.arange(number)), 0, 1)[None]
    return over(queries_of, heads), over(keys_of, kv_heads), over(values_of, kv_heads)
