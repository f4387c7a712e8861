"""Where a pass's tokens, stream and cache lie: on one device, or on the mesh of its attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from minference_jax import ShardedAttention
from minference_jax.kv_cache import KeptKV, KVCompression
from minference_jax.sharding import balanced_order, keep_sharded, padded_length
from pallas_kernels.common.tiling import round_up


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of a pass, which its attention knows.

    Tensor parallel, the parameters lie split over `heads_axis` (`weights.sharding`), the compiler
    splits what they compute, and the residual stream is on all devices. Context parallel, rows of
    the stream lie in `balanced_order`, split over `sequence_axis`; in the cache they are in the
    order of the prompt, split as well.

    Attributes:
        attention: None if all is on one device.
    """

    attention: ShardedAttention | None

    @classmethod
    def of(cls, attention_fn: Any) -> "Placement":
        """That of a pass with this attention."""
        return cls(attention_fn if isinstance(attention_fn, ShardedAttention) else None)

    @property
    def parts(self) -> int:
        """Devices that share a prompt."""
        return 1 if self.attention is None else self.attention.prompt_devices

    def padded(self, length: int) -> int:
        """Rows that a prompt of this length takes."""
        if self.attention is None or self.parts == 1:
            return length
        return padded_length(length, self.parts, self.attention.block_q)

    def arrange(
        self, tokens: Int[Array, "batch s"], lengths: Int[Array, " batch"] | None
    ) -> tuple[Int[Array, "batch p"], Int[Array, " p"], Int[Array, " batch"] | None]:
        """Tokens as they are read, their positions, and the real tokens of each row."""
        batch, length = tokens.shape
        if self.parts == 1:
            return tokens, jnp.arange(length, dtype=jnp.int32), lengths
        padded = self.padded(length)
        order = balanced_order(padded, self.parts)
        tokens = jnp.pad(tokens, ((0, 0), (0, padded - length)))[:, order]
        lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
        return tokens, jnp.asarray(order, jnp.int32), lengths

    def rows(self, x: Num[Array, "batch s *rest"]) -> Num[Array, "batch s *rest"]:
        """Rows of tokens, on the devices that compute them."""
        return x if self.attention is None else self._on(x, None, self.attention.sequence_axis)

    def of_cache(self, kv_heads: int) -> NamedSharding | None:
        """How keys and values `[layers, batch, slots, kv_heads, head_dim]` lie on the devices."""
        if self.attention is None:
            return None
        split = kv_heads % self.attention.head_devices == 0
        heads = self.attention.heads_axis if split else None
        spec = PartitionSpec(None, None, self.attention.sequence_axis, heads)
        return NamedSharding(self.attention.auto_mesh, spec)

    def logits(self, x: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Logits, whole on every device; each computes those of its part of the vocabulary."""
        if self.attention is None:
            return x
        return self._on(self._on(x, None, self.attention.heads_axis))

    def row_at(self, x: Float[Array, "batch s embed"], row: Int[Array, " batch"]) -> Array:
        """The row at a position; an index into rows that are split would gather all of them."""
        if self.parts == 1:
            return jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]
        here = jnp.asarray(balanced_order(x.shape[1], self.parts))[None, :] == row[:, None]
        return jnp.sum(jnp.where(here[:, :, None], x, 0), axis=1)

    def capacity(self, asked: int, compression: KVCompression | None, length: int) -> int:
        """Slots of a cache: as asked, or some more that divide among devices."""
        if self.parts == 1:
            return asked
        slots = self.padded(length)
        if compression is not None:
            slots = min(slots, compression.capacity)
        return round_up(max(asked, slots), self.parts)

    def keep(
        self,
        compression: KVCompression | None,
        q: Float[Array, "batch s heads head_dim"],
        k: Float[Array, "batch s kv_heads head_dim"],
        v: Float[Array, "batch s kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None,
        stored: Int[Array, " batch"],
        capacity: int,
    ) -> KeptKV:
        """What stays of a layer's keys and values, with room up to `capacity`."""
        if self.attention is not None and (compression is not None or self.parts > 1):
            return keep_sharded(
                compression, q, k, v, lengths=stored, capacity=capacity, attention=self.attention
            )
        kept = KeptKV(k, v, stored)
        if compression is not None:
            kept = compression(q, k, v, lengths=lengths)
        room = ((0, 0), (0, capacity - kept.keys.shape[1]), (0, 0), (0, 0))
        return kept._replace(keys=jnp.pad(kept.keys, room), values=jnp.pad(kept.values, room))

    def _on(self, x, *axes):
        if self.attention is None:
            return x
        where = NamedSharding(self.attention.auto_mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(x, where)


ONE_DEVICE = Placement(None)
