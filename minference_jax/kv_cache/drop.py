"""Nothing kept: for the time to the first token alone."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache.types import KeptKV, check_prompt_shapes


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DropKV:
    """Keeps no key and no value, so that nothing can be generated: a KVCompression."""

    @property
    def capacity(self) -> int:
        """Keys that a layer keeps of a row: none."""
        return 0

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
        return KeptKV(k[:, :0], v[:, :0], jnp.zeros(k.shape[0], jnp.int32))
