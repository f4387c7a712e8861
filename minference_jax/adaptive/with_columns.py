"""The hybrid: blocks that each query tile chooses, and columns that the last queries choose."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import (
    Estimator,
    Layout,
    check_number,
    for_all_heads,
    per_list,
    split_heads,
    sum_members,
)
from minference_jax.index.lines import LAST_Q, last_query_scores
from minference_jax.index.select import compact, top_k_mask
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WithColumns:
    """What another estimator finds, united with the columns that the last 64 queries weigh most.

    Blocks protect what every part of the prompt needs, columns what its end asks for. A column's
    score is its softmax mass, summed over the last 64 real queries (as for vertical lines).

    Attributes:
        blocks: the other estimator; it must not choose columns itself.
        num_columns: columns of each list.
        max_columns: capacity to compile for; 0 takes the next power of two (static).
    """

    blocks: Estimator
    num_columns: Any
    max_columns: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a budget out of range, or for an array without a capacity."""
        if not self.max_columns:
            if not isinstance(self.num_columns, int):
                raise ValueError("`max_columns` must be given where `num_columns` is an array")
            check_number("num_columns", self.num_columns, 0, 2**30)
            capacity = 1 << max(self.num_columns - 1, 0).bit_length()
            object.__setattr__(self, "max_columns", capacity)
        check_number("num_columns", self.num_columns, 0, self.max_columns)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
        line_scores: tuple[Array, Array] | None = None,
    ) -> BlockSparseIndex:
        """The index; see `Estimator`.

        With `line_scores` (what `last_query_scores` gives) columns are chosen by these.
        """
        index = self.blocks(q, k, lengths=lengths, q_offset=q_offset, layout=layout)
        if index.columns.shape[2]:
            raise ValueError("`blocks` chooses columns itself; give one estimator all columns")
        kv_len = k.shape[1]
        vertical, _ = line_scores or last_query_scores(
            q, k, lengths=lengths, q_offset=q_offset, last_q=LAST_Q
        )
        by_list = split_heads(q, k.shape[2], layout)
        budget = jnp.minimum(per_list(self.num_columns, "num_columns", by_list), self.max_columns)
        key = jnp.arange(kv_len, dtype=jnp.int32)

        def one_list(scores, budget, length):
            chosen = top_k_mask(jnp.where(key < length, scores, -1.0), budget)
            columns = compact(key, chosen, self.max_columns, kv_len)
            return columns, jnp.sum(chosen).astype(jnp.int32)

        over_lists = jax.vmap(jax.vmap(one_list, in_axes=(0, 0, None)), in_axes=(0, 0, None))
        found = jax.vmap(over_lists)(sum_members(vertical, by_list), budget, lengths)
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        columns, count = for_all_heads(jax.tree.map(flat, found), by_list)
        return dataclasses.replace(index, columns=columns, column_count=count)
