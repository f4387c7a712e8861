"""Keys and values kept in 8 bits."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from minference_jax.kv_cache.types import KeptKV, KVCompression, KVScales, check_prompt_shapes


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EightBitKV:
    """Keeps keys and values in 8 bits with a scale for each row, head and channel: a KVCompression.

    Scales are chosen from the prompt, once; what exceeds `headroom` times a channel's largest
    number in later tokens is cut to that. After a long prompt, integers are off by at most 1/169 of
    the channel's largest number; floats (e4m3) by at most 1/16 of the number itself. A channel's
    scale is multiplied into the queries and into the output of attention, so that decoding makes no
    wider copy.

    Attributes:
        of: what is kept in 8 bits; everything if None.
        dtype: `jnp.int8`, or `jnp.float8_e4m3fn`, which rounds more (static).
    """

    of: KVCompression | None = None
    dtype: Any = dataclasses.field(default=jnp.int8, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for another type of numbers."""
        if self.dtype not in (jnp.int8, jnp.float8_e4m3fn):
            raise ValueError(
                f"`dtype` must be jnp.int8 or jnp.float8_e4m3fn, got {jnp.dtype(self.dtype).name}"
            )

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row."""
        return jnp.iinfo(jnp.int32).max if self.of is None else self.of.capacity

    @property
    def window(self) -> int:
        """How many of each row's last queries it reads."""
        return 0 if self.of is None else self.of.window

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_start: Int[Array, " batch"] | None = None,
    ) -> KeptKV:
        """What stays of one layer; see `KVCompression`."""
        check_prompt_shapes(q, k, v, lengths, q_start)
        if self.of is not None:
            kept = self.of(q, k, v, lengths=lengths, q_start=q_start)
        else:
            every = jnp.full(k.shape[0], k.shape[1], jnp.int32)
            kept = KeptKV(k, v, every if lengths is None else lengths)
        scales = KVScales(*(_scale(x, kept.stored, self.dtype) for x in (kept.keys, kept.values)))
        keys = to_8_bits(kept.keys, scales.keys, self.dtype)
        values = to_8_bits(kept.values, scales.values, self.dtype)
        return KeptKV(keys, values, kept.stored, scales)


def headroom(tokens: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """How far later numbers may exceed the largest of so many tokens before they are cut.

    Half as much again, and more for short prompts, whose largest numbers say little of those to
    come.
    """
    return 1.5 * (1 + 32 / jnp.maximum(tokens, 1).astype(jnp.float32))


def to_8_bits(
    x: Float[Array, "batch slots kv_heads head_dim"],
    scale: Float[Array, "batch kv_heads head_dim"],
    dtype: Any,
) -> Num[Array, "batch slots kv_heads head_dim"]:
    """`x / scale`, rounded; what is too large becomes the largest number that there is."""
    scaled = x.astype(jnp.float32) / scale[:, None]
    cut = jnp.clip(scaled, -_largest(dtype), _largest(dtype))
    return (jnp.round(cut) if dtype == jnp.int8 else cut).astype(dtype)


def from_8_bits(
    x: Num[Array, "batch slots kv_heads head_dim"],
    scale: Float[Array, "batch kv_heads head_dim"],
    dtype: Any,
) -> Float[Array, "batch slots kv_heads head_dim"]:
    """What `to_8_bits` stored, multiplied out."""
    return (x.astype(jnp.float32) * scale[:, None]).astype(dtype)


def _largest(dtype: Any) -> float:
    return float((jnp.iinfo if dtype == jnp.int8 else jnp.finfo)(dtype).max)


def _scale(x: Array, stored: Array, dtype: Any) -> Float[Array, "batch kv_heads head_dim"]:
    """Scales with which the first `stored` keys of each row have headroom."""
    real = jnp.arange(x.shape[1])[None, :] < stored[:, None]
    largest = jnp.max(jnp.where(real[:, :, None, None], jnp.abs(x), 0), axis=1)
    scale = largest.astype(jnp.float32) * (headroom(stored) / _largest(dtype))[:, None, None]
    return jnp.where(scale > 0, scale, 1.0)
