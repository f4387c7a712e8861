"""What an attention visited, where no index of tiles says it."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CountedPairs:
    """Pairs that an attention has counted itself, for `observe_density`.

    Attributes:
        visited: (query, key) pairs of real rows that were visited, each once.
        causal: those that dense attention visits.
        executed: pairs that were computed, masked ones among them.
    """

    visited: Float[Array, "batch heads"]
    causal: Float[Array, "batch heads"]
    executed: Float[Array, "batch heads"]

    @classmethod
    def of_rows(
        cls,
        keys: Int[Array, "#batch #heads q_len"],
        executed: Float[Array, "batch heads"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
    ) -> "CountedPairs":
        """Sums what every row visited; rows from `lengths` on do not count."""
        position = q_offset + jnp.arange(keys.shape[2])
        real = position[None, None, :] < lengths[:, None, None]
        total = lambda x: jnp.broadcast_to(
            jnp.sum(jnp.where(real, x, 0).astype(jnp.float32), axis=2), executed.shape
        )
        return cls(total(keys), total(position[None, None, :] + 1), executed)

    def visited_pairs(
        self,
        q_len: int,
        kv_len: int,
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch heads"], Float[Array, "batch heads"]]:
        """The counts, as `BlockSparseIndex.visited_pairs` gives them for the same call."""
        return self.visited, self.causal
