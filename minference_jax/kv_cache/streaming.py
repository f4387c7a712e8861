"""StreamingLLM's cache: the first tokens of a prompt and its last ones."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache.types import KeptKV, check_prompt_shapes, gather_kept


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingKV:
    """Keeps sinks and recent tokens (StreamingLLM), at their true positions: a KVCompression.

    The choice is made once, after prefill; tokens generated later are all kept.

    Attributes:
        sink_size: first tokens kept (static).
        recent_size: last tokens kept (static).
    """

    sink_size: int = dataclasses.field(default=128, metadata={"static": True})
    recent_size: int = dataclasses.field(default=3968, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a size out of range."""
        if self.sink_size < 0 or self.recent_size < 1:
            raise ValueError(
                "StreamingKV needs `sink_size` of at least 0 and `recent_size` of at least 1, got "
                f"{self.sink_size} and {self.recent_size}"
            )

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row."""
        return self.sink_size + self.recent_size

    @property
    def window(self) -> int:
        """How many of each row's last queries it reads: none."""
        return 0

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
        batch, kv_len, kv_heads, _ = k.shape
        if lengths is None:
            lengths = jnp.full(batch, kv_len, jnp.int32)
        stored = jnp.minimum(lengths, self.capacity)
        slot = jnp.arange(min(self.capacity, kv_len))[None, :]
        dropped = jnp.where(slot < self.sink_size, 0, (lengths - stored)[:, None])
        positions = jnp.where(slot < stored[:, None], slot + dropped, kv_len)
        shape = (batch, kv_heads, slot.shape[1])
        return gather_kept(k, v, jnp.broadcast_to(positions[:, None, :], shape), stored)
