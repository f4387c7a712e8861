"""Keys and values kept as 8-bit floats."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache.types import KeptKV, KVCompression, KVScales, check_prompt_shapes

DTYPE = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(DTYPE).max)
# Tokens read later may exceed the prompt's largest number this many times before they are cut to
# the largest that can be stored. It costs no digits: the numbers are floats, with 3 bits of
# mantissa down to 1/14,336 of the prompt's largest.
HEADROOM = 2.0


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8KV:
    """Keeps keys and values in 8 bits (e4m3) with one scale for each row and head: a KVCompression.

    A number is off by at most 1/16 of itself. Scales are chosen from the prompt, once; keys and
    values of later tokens that exceed twice the prompt's largest are cut to that.

    Attributes:
        of: what is kept in 8 bits; everything if None.
    """

    of: KVCompression | None = None

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row."""
        return jnp.iinfo(jnp.int32).max if self.of is None else self.of.capacity

    def __call__(
        self,
        q: Float[Array, "batch kv_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> KeptKV:
        """What stays of one layer; see `KVCompression`."""
        check_prompt_shapes(q, k, v, lengths)
        if self.of is not None:
            kept = self.of(q, k, v, lengths=lengths)
        else:
            every = jnp.full(k.shape[0], k.shape[1], jnp.int32)
            kept = KeptKV(k, v, every if lengths is None else lengths)
        scales = KVScales(_scale(kept.keys, kept.stored), _scale(kept.values, kept.stored))
        keys, values = to_float8(kept.keys, scales.keys), to_float8(kept.values, scales.values)
        return KeptKV(keys, values, kept.stored, scales)


def to_float8(
    x: Float[Array, "batch slots kv_heads head_dim"], scale: Float[Array, "batch kv_heads"]
) -> Float[Array, "batch slots kv_heads head_dim"]:
    """`x / scale` in 8 bits; what is too large becomes the largest number, not NaN."""
    scaled = x.astype(jnp.float32) / scale[:, None, :, None]
    return jnp.clip(scaled, -_LARGEST, _LARGEST).astype(DTYPE)


def from_float8(
    x: Float[Array, "batch slots kv_heads head_dim"],
    scale: Float[Array, "batch kv_heads"],
    dtype: Any,
) -> Float[Array, "batch slots kv_heads head_dim"]:
    """What `to_float8` stored, multiplied out."""
    return (x.astype(jnp.float32) * scale[:, None, :, None]).astype(dtype)


def _scale(x: Array, stored: Array) -> Float[Array, "batch kv_heads"]:
    """Scales with which the first `stored` keys of each row have headroom."""
    real = jnp.arange(x.shape[1])[None, :] < stored[:, None]
    largest = jnp.max(jnp.where(real[:, :, None, None], jnp.abs(x), 0), axis=(1, 3))
    largest = largest.astype(jnp.float32) * (HEADROOM / _LARGEST)
    return jnp.where(largest > 0, largest, 1.0)
