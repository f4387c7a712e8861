"""SnapKV: the keys that the prompt's last queries vote for."""

import dataclasses
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index.lines import last_query_scores
from minference_jax.index.select import compact, top_k_mask
from minference_jax.kv_cache.types import KeptKV, check_prompt_shapes, gather_kept

Pooling = Literal["avg", "max"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SnapKV:
    """Keeps the last tokens and those that their queries attend to most: a KVCompression.

    A key's votes are its column sum of the causal softmax of the last `window` queries, summed over
    the query heads that share it, then pooled over neighbours, so that what is kept is not torn
    apart. MInference's experiments (paper, Table 5) take the mean of 5; the maximum of 7 lost fewer
    of the facts that were tried here (README).

    Attributes:
        budget: keys kept of each row and head, the window among them (static).
        window: last tokens that vote and are always kept (static).
        kernel_size: keys whose votes are pooled, an odd number; zeros beyond both ends of the keys
            before the window (static).
        pooling: their mean or their maximum (static).
    """

    budget: int = dataclasses.field(default=4096, metadata={"static": True})
    window: int = dataclasses.field(default=32, metadata={"static": True})
    kernel_size: int = dataclasses.field(default=7, metadata={"static": True})
    pooling: Pooling = dataclasses.field(default="max", metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a size out of range."""
        check_vote(self)

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row."""
        return self.budget

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
        batch, kv_len = k.shape[:2]
        if lengths is None:
            lengths = jnp.full(batch, kv_len, jnp.int32)
        budgets = jnp.full(batch, self.budget, jnp.int32)
        return keep_voted(
            q, k, v, lengths=lengths, q_start=q_start, budgets=budgets, capacity=self.capacity,
            window=self.window, kernel_size=self.kernel_size, pooling=self.pooling,
        )  # fmt: skip


def check_vote(compression) -> None:
    """Raises ValueError unless budget, window, kernel size and pooling make sense together."""
    name, window = type(compression).__name__, compression.window
    if window < 1 or compression.budget <= window:
        raise ValueError(
            f"{name} needs `window` of at least 1 and a `budget` above it, got a window of "
            f"{window} and a budget of {compression.budget}"
        )
    if compression.kernel_size < 1 or compression.kernel_size % 2 == 0:
        raise ValueError(
            f"{name} needs an odd `kernel_size` of at least 1, got {compression.kernel_size}"
        )
    if compression.pooling not in ("avg", "max"):
        raise ValueError(f'{name} needs `pooling` "avg" or "max", got {compression.pooling!r}')


def keep_voted(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    q_start: Int[Array, " batch"] | None = None,
    budgets: Int[Array, " batch"],
    capacity: int,
    window: int,
    kernel_size: int,
    pooling: Pooling,
) -> KeptKV:
    """The `budgets` keys with most votes of each row and key/value head; see `SnapKV`.

    Args:
        q: queries of the prompt.
        k: keys.
        v: values.
        lengths: real tokens of each row.
        q_start: as in `KVCompression`.
        budgets: keys to keep of each row, at least `window`.
        capacity: the largest budget that there can be.
        window: last queries that vote; their keys are always kept.
        kernel_size: keys whose votes are pooled.
        pooling: how.
    """
    batch, kv_len, kv_heads, _ = k.shape
    slots = min(capacity, kv_len)
    q_offset = jnp.int32(0) if q_start is None else q_start
    votes, _ = last_query_scores(q, k, lengths=lengths, q_offset=q_offset, last_q=window)
    votes = jnp.sum(votes.reshape(batch, kv_heads, -1, kv_len), axis=2)
    position = jnp.arange(kv_len)

    def choose(votes, length, budget):
        start = length - window
        pooled = _pool(jnp.where(position < start, votes, 0.0), kernel_size, pooling)
        scores = jnp.where(position < start, pooled, jnp.inf)
        kept = top_k_mask(jnp.where(position < length, scores, -1.0), budget)
        return compact(position, kept, slots, kv_len)

    over_heads = jax.vmap(choose, in_axes=(0, None, None))
    positions = jax.vmap(over_heads)(votes, lengths, budgets)
    return gather_kept(k, v, positions, jnp.minimum(lengths, budgets))


def _pool(votes: Float[Array, " n"], kernel_size: int, pooling: Pooling) -> Float[Array, " n"]:
    """Mean or maximum of each vote and its neighbours; votes are not negative."""
    combine = jax.lax.max if pooling == "max" else jax.lax.add
    pooled = jax.lax.reduce_window(votes, 0.0, combine, (kernel_size,), (1,), "SAME")
    return pooled if pooling == "max" else pooled / kernel_size
