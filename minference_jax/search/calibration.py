"""What the search looks at: calibration prompts, the kernel's tiles, and heads that must agree."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.attention import DenseAttention, SparseAttention
from minference_jax.index import build_index
from minference_jax.index.lines import LAST_Q
from minference_jax.patterns import HeadPatterns
from pallas_kernels import BlockSparseIndex
from pallas_kernels.block_sparse_attention.api import Implementation

# Heads that get the same pattern: each its own, or all that share keys and values one.
Group = Literal["head", "kv_group"]


class Calibration(NamedTuple):
    """One layer's inputs for a batch of calibration prompts, after rotary embedding.

    Prompts of different lengths are padded to one length on the right, so that they share a
    program; `lengths` then says how long they are.

    The last two are for the objective "residual_error", which says how far a head's error moves the
    residual stream. They come together: a model knows them (`models.common.capture`), q, k and v
    alone do not.

    Attributes:
        q: queries.
        k: keys.
        v: values.
        lengths: real tokens of each prompt, all of them if None.
        projection_gram: W W^T of each head's slice W [head_dim, embed] of the output projection.
        row_weight: 1 / |x|^2 of each row x of the residual stream before the layer.
    """

    q: Float[Array, "batch length heads head_dim"]
    k: Float[Array, "batch length kv_heads head_dim"]
    v: Float[Array, "batch length kv_heads head_dim"]
    lengths: Int[Array, " batch"] | None = None
    projection_gram: Float[Array, "heads head_dim head_dim"] | None = None
    row_weight: Float[Array, "batch length"] | None = None


# Calibrations of one layer; iterated several times, so that they can be computed when needed.
Calibrations = Iterable[Calibration]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How the attention will be executed; the attributes are those of `SparseAttention`."""

    block_q: int = 128
    block_kv: int = 128
    implementation: Implementation | None = None
    stagger: bool = True

    def attention(self, patterns: HeadPatterns) -> SparseAttention:
        """Attention with these patterns, whose heads stay sparse whatever that costs."""
        return SparseAttention(
            patterns,
            block_q=self.block_q,
            block_kv=self.block_kv,
            implementation=self.implementation,
            dense_above=None,
            stagger=self.stagger,
        )

    def index(
        self,
        patterns: HeadPatterns,
        q: Float[Array, "batch length heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None,
        line_scores: tuple[Array, Array] | None = None,
    ) -> BlockSparseIndex:
        """What `attention` visits with the patterns of one layer; see `build_index`."""
        return build_index(
            patterns,
            q,
            k,
            lengths=lengths,
            block_q=self.block_q,
            block_kv=self.block_kv,
            last_q=LAST_Q,
            stagger=self.stagger,
            line_scores=line_scores,
        )

    def dense(self) -> DenseAttention:
        """What candidates are compared with."""
        return DenseAttention(
            block_q=self.block_q, block_kv=self.block_kv, implementation=self.implementation
        )


def each(prompts: Calibrations) -> Iterator[Calibration]:
    """Iterates over the prompts.

    Raises:
        TypeError: they can be iterated only once.
        ValueError: there are none.
    """
    if isinstance(prompts, Iterator):
        raise TypeError(
            "calibration prompts are read several times: expected a sequence, or an object whose "
            f"`__iter__` starts again, got a {type(prompts).__name__}"
        )
    empty = True
    for prompt in prompts:
        empty = False
        yield prompt
    if empty:
        raise ValueError("expected at least one calibration prompt, got none")


def summed(prompts: Calibrations, run: Callable[[Calibration], Any]) -> Any:
    """Adds up, in float64, the arrays that `run` gives for every prompt.

    Raises:
        TypeError: see `each`.
        ValueError: see `each`; or some prompts say how errors reach the residual stream, and others
            do not.
    """
    total, first = None, None
    for prompt in each(prompts):
        known = (prompt.projection_gram is not None, prompt.row_weight is not None)
        first = known if first is None else first
        if known != first or known[0] != known[1]:
            raise ValueError(
                "every calibration prompt must have both `projection_gram` and `row_weight`, or "
                "none of them any of the two"
            )
        sums = jax.tree.map(lambda x: x.astype(np.float64), jax.device_get(run(prompt)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return total


def pooled(
    values: Float[np.ndarray, "*any heads"], kv_heads: int, group: Group
) -> Float[np.ndarray, "*any heads"]:
    """Means over the heads that must agree, repeated for each of them."""
    if group == "head":
        return values
    size = values.shape[-1] // kv_heads
    means = values.reshape(*values.shape[:-1], kv_heads, size).mean(axis=-1)
    return np.repeat(means, size, axis=-1)
