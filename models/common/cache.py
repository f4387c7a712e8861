"""The key/value cache of all layers: static capacity, each layer's own number of keys."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Num

from minference_jax.kv_cache import KVCompression, KVScales
from minference_jax.kv_cache.eight_bits import from_8_bits, to_8_bits


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotary embedding) and values of the tokens read so far, or of a part of them.

    Attributes:
        keys: `[layers, batch, capacity, kv_heads, head_dim]`; rows from `stored` on mean nothing.
        values: as `keys`.
        stored: `[layers, batch]` int32, keys that each layer holds of each row, in the order of
            their positions: fewer than `lengths` if a compression dropped some.
        lengths: `[batch]` int32, tokens read of each row; also the position of its next token.
        rope_length: `[batch]` int32, the length that chose each row's rotary frequencies.
        scales: of keys and values in 8 bits, `[layers, batch, kv_heads, head_dim]`; else None.
        sharding: how keys and values lie on several devices, and stay while tokens are read onto
            them; None on one (static).
    """

    keys: Num[Array, "layers batch capacity kv_heads head_dim"]
    values: Num[Array, "layers batch capacity kv_heads head_dim"]
    stored: Int[Array, "layers batch"]
    lengths: Int[Array, " batch"]
    rope_length: Int[Array, " batch"]
    scales: KVScales | None = None
    sharding: NamedSharding | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Keys a layer can hold of a row."""
        return self.keys.shape[2]


def held(stores: tuple[Array, Array], sharding: NamedSharding | None) -> tuple[Array, Array]:
    """Keys and values of all layers, kept where they lie: the compiler might move them."""
    return stores if sharding is None else jax.lax.with_sharding_constraint(stores, sharding)


def kept_tokens(compression: KVCompression | None, length: int) -> int:
    """The most tokens of a prompt that a layer keeps: all without a compression."""
    return length if compression is None else min(compression.capacity, length)


def room_for(
    compression: KVCompression | None, length: int, new_tokens: int, chunk_size: int | None
) -> int:
    """The capacity of a cache for a prompt and new tokens.

    For a prompt in chunks it is a multiple of their size, which spares its prefill a copy.
    """
    kept = kept_tokens(compression, length)
    chunk = 1 if chunk_size is None or chunk_size >= length else chunk_size
    return max(kept + new_tokens, -(-kept // chunk) * chunk)


def to_stored(
    k: Float[Array, "batch s kv_heads head_dim"],
    v: Float[Array, "batch s kv_heads head_dim"],
    scales: KVScales | None,
    dtype: Any,
) -> tuple[Array, Array]:
    """Keys and values of one layer as its cache, of this dtype, stores them."""
    if scales is None:
        return k, v
    return to_8_bits(k, scales.keys, dtype), to_8_bits(v, scales.values, dtype)


def from_stored(
    keys: Num[Array, "batch s kv_heads head_dim"],
    values: Num[Array, "batch s kv_heads head_dim"],
    scales: KVScales | None,
    dtype: Any,
) -> tuple[Array, Array]:
    """Keys and values of one layer's cache as attention reads them; 8 bits become a wider copy."""
    if scales is None:
        return keys, values
    return from_8_bits(keys, scales.keys, dtype), from_8_bits(values, scales.values, dtype)


def attend_cached(
    q: Float[Array, "batch 1 heads head_dim"],
    keys: Num[Array, "batch capacity kv_heads head_dim"],
    values: Num[Array, "batch capacity kv_heads head_dim"],
    lengths: Int[Array, " batch"],
    scales: KVScales | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """Attends one query of each row to the row's first `lengths` keys, densely, softmax in fp32.

    Query heads are grouped by the key/value head they share, so keys and values are never repeated.
    Scales of keys in 8 bits are multiplied into the queries, those of values into the output.
    """
    batch, _, heads, head_dim = q.shape
    grouped = q.reshape(batch, keys.shape[2], heads // keys.shape[2], head_dim)
    if scales is not None:
        grouped = (grouped.astype(jnp.float32) * scales.keys[:, :, None]).astype(q.dtype)
    scores = jnp.einsum(
        "bngd,bknd->bngk", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32
    )
    visible = jnp.arange(keys.shape[1])[None, :] < lengths[:, None]
    scores = jnp.where(visible[:, None, None, :], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum(
        "bngk,bknd->bngd", weights, values.astype(q.dtype), preferred_element_type=jnp.float32
    )
    if scales is not None:
        out = out * scales.values[:, :, None]
    return out.reshape(q.shape).astype(q.dtype)
