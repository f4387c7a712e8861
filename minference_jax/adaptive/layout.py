"""What the adaptive estimators share: tile sizes, who shares a list, and parameters as data."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv

# Of a query tile's list: at most this many key tiles, and at most this share of all key tiles. At
# 1M tokens this keeps the lists of 32 heads to 1 GB.
_MOST_BLOCKS = 1024
_LARGEST_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an estimator lays out its lists; static.

    Attributes:
        block_q: query rows of a tile.
        block_kv: keys of a tile, and of the blocks that are scored.
        shared: the query heads of a key/value head share one list; they are scored as one head
            that has the rows of all of them.
        max_blocks: most key tiles a query tile's list holds; one that needs more runs densely.
            None: half of all key tiles, at most 1024.
    """

    block_q: int = 128
    block_kv: int = 128
    shared: bool = False
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a capacity below one."""
        if self.max_blocks is not None and self.max_blocks < 1:
            raise ValueError(f"`max_blocks` must be at least 1, got {self.max_blocks}")

    def capacity(self, kv_len: int) -> int:
        """Entries of each query tile's list."""
        blocks = cdiv(kv_len, self.block_kv)
        # Short lists must hold a tile's own rows, sinks and a window whatever the share.
        wanted = max(16, min(int(_LARGEST_SHARE * blocks), _MOST_BLOCKS))
        return min(blocks, wanted if self.max_blocks is None else self.max_blocks)


@runtime_checkable
class Estimator(Protocol):
    """Finds what each query tile of one layer visits, from the layer's queries and keys.

    An implementation is a pytree: its parameters are data, so that other values do not recompile.
    A parameter is a number for all heads or an array of one for each list ([heads], or [kv_heads]
    where lists are shared). One that decides for each query tile by its own queries and all keys
    says so by an attribute `by_tile`, true: with it, prompts can be split over devices.
    """

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
    ) -> BlockSparseIndex:
        """The index, for all heads.

        Args:
            q: queries.
            k: keys; kv_heads divides heads.
            lengths: real keys of each batch row.
            q_offset: position of the first query among the keys.
            layout: tile sizes, sharing and capacity.
        """
        ...


def split_heads(
    q: Float[Array, "batch q_len heads head_dim"], kv_heads: int, layout: Layout
) -> Float[Array, "batch q_len kv_heads lists members head_dim"]:
    """Query heads by the list that they read: `lists` for each KV head, of `members` heads each."""
    batch, q_len, heads, head_dim = q.shape
    group = heads // kv_heads
    lists, members = (1, group) if layout.shared else (group, 1)
    return q.reshape(batch, q_len, kv_heads, lists, members, head_dim)


def per_list(
    value: Any, name: str, like: Float[Array, "batch q_len kv_heads lists members head_dim"]
) -> Array:
    """A parameter for every list [batch, kv_heads, lists].

    Raises:
        ValueError: the parameter is for another number of lists, or for several layers.
    """
    value = jnp.asarray(value)
    batch, _, kv_heads, lists = like.shape[:4]
    if value.ndim > 1:
        raise ValueError(
            f"`{name}` is [layers, heads] {value.shape}: call `attention.layer(i)(q, k, v)`"
        )
    if value.shape not in ((), (1,), (kv_heads * lists,)):
        raise ValueError(
            f"`{name}` is for {value.shape[0]} lists, but there are {kv_heads * lists}: one for "
            "each query head, or for each KV head where lists are shared"
        )
    value = jnp.broadcast_to(value, (kv_heads * lists,)).reshape(1, kv_heads, lists)
    return jnp.broadcast_to(value, (batch, kv_heads, lists))


def sum_members(
    scores: Float[Array, "batch heads n"],
    like: Float[Array, "batch q_len kv_heads lists members head_dim"],
) -> Float[Array, "batch kv_heads lists n"]:
    """Scores of the query heads, summed over those that share a list."""
    batch, _, kv_heads, lists, members, _ = like.shape
    return jnp.sum(scores.reshape(batch, kv_heads, lists, members, -1), axis=3)


def for_all_heads(
    arrays: Any, like: Float[Array, "batch q_len kv_heads lists members head_dim"]
) -> Any:
    """From arrays of lists [batch, lists, ...] to those of the query heads that read them."""
    members = like.shape[4]
    return jax.tree.map(lambda x: jnp.repeat(x, members, axis=1), arrays) if members > 1 else arrays


def check_number(name: str, value: Any, low: float | int, high: float | int) -> None:
    """Raises ValueError for a plain number outside low..high; arrays are data and not looked at."""
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise ValueError(f"`{name}` must be within {low}..{high}, got {value}")
