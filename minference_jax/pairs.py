"""What an attention visits: counted by itself where no index of tiles says it, or read from one."""

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockSparseIndex


class Executed(NamedTuple):
    """What a layer's kernel computes, read from its index at no cost.

    Attributes:
        count: key tiles of every query tile.
        columns: single keys of every head.
        block_q: rows of a query tile.
        block_kv: keys of a tile.
    """

    count: Int[Array, "*layers batch heads tiles"]
    columns: Int[Array, "*layers batch heads"]
    block_q: Int[Array, "*layers"]
    block_kv: Int[Array, "*layers"]

    @classmethod
    def of(cls, index: BlockSparseIndex) -> "Executed":
        """What the index of one layer makes a kernel compute."""
        sizes = jnp.int32(index.block_q), jnp.int32(index.block_kv)
        return cls(index.count, index.column_count, *sizes)


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
