"""Attention callables: sparse by pattern, and dense through the same kernel."""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.index import build_index, dense_index, fallback
from minference_jax.index.dense import dense_like
from minference_jax.index.lines import LAST_Q
from minference_jax.patterns import HeadPatterns, VerticalSlash
from pallas_kernels import BlockSparseIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.index import ALIGNMENT
from pallas_kernels.common.checks import check_attention_shapes, check_lengths
from pallas_kernels.common.environment import not_hopper

# Wider heads leave no room in shared memory for staggered tiles, nor for tiles wider than 64 keys.
_WIDEST_STAGGERED = 128


def _device_break_even() -> int:
    """Keys for which the default device builds an index as fast as it attends densely.

    For 8,192 keys and 32 heads of 128, an H200 takes 0.55 ms for the parts of a vertical-slash
    index and 0.92 ms for dense attention (`experiments/results/h200/latency.jsonl`): equal at 6,300
    keys. The number is above that, because parts that pay barely are not worth their risk.
    """
    return 0 if not_hopper() else 7168


def attend_for_output(
    self: Any,
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
) -> Float[Array, "batch q_len heads head_dim"]:
    """The output of `attend`, without the index: the call of every AttentionFn of this package."""
    return self.attend(q, k, v, lengths=lengths, q_offset=q_offset)[0]


def take_layer[Attention](self: Attention, number: int) -> Attention:
    """The attention of one layer of a model.

    Raises:
        ValueError: there is no such layer, or this is the attention of one layer already.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(self)]
    if any(len(shape) < 2 for shape in shapes):
        raise ValueError(
            "this is the attention of one layer: its arrays have no leading [layers] axis (an "
            "AdaptiveAttention gets it with `for_layers`)"
        )
    if shapes and not -shapes[0][0] <= number < shapes[0][0]:
        raise ValueError(f"layer {number} of an attention with {shapes[0][0]} layers")
    return jax.tree.map(lambda x: x[number], self)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseAttention:
    """Sparse causal attention with the patterns of a whole model: an AttentionFn.

    Holds `[layers, heads]` arrays. Models slice the layer axis while they scan their layers;
    elsewhere call `attention.layer(i)(q, k, v)`.

    Attributes:
        patterns: the pattern of every head.
        block_q: query rows of a tile (static).
        block_kv: keys of a tile; None takes what was measured best: 96, or 128 if the patterns
            have room for block-sparse heads, or 64 for heads wider than 128 (static).
        implementation: which kernel runs; None chooses one for the default device (static).
        dense_above: a head that would execute more than this many times the key tiles of dense
            attention runs densely; None keeps every list, whatever it costs. A staggered tile takes
            1.1 times as long as a plain one (static).
        stagger: cut the tiles of lines for half a query tile's rows; the second half visits them
            `block_q / 2` keys later. Fewer keys are visited for the same lines. None does so for
            heads of at most 128 (static).
        break_even: keys at which estimating an index takes as long as dense attention. A layer
            whose budgets cannot win that time back is dense; 0 always estimates. None is 7,168 on
            Hopper GPUs; 0 elsewhere, and where `dense_above` is None (static).
    """

    patterns: HeadPatterns
    block_q: int = dataclasses.field(default=128, metadata={"static": True})
    block_kv: int | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    dense_above: float | None = dataclasses.field(default=0.9, metadata={"static": True})
    stagger: bool | None = dataclasses.field(default=None, metadata={"static": True})
    break_even: int | None = dataclasses.field(default=None, metadata={"static": True})

    layer = take_layer
    __call__ = attend_for_output

    def attend(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
        line_scores: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], BlockSparseIndex]:
        """The output and the index that was visited.

        With `line_scores` (see `build_index`) vertical-slash heads choose lines by these instead of
        estimating them from the last queries.

        Raises:
            ValueError: shapes disagree, the patterns are for another number of heads, or this is
                the attention of a whole model rather than of one layer.
        """
        check_attention_shapes(q, k, v)
        check_lengths(lengths, q.shape[0], k.shape[1])
        at = {"lengths": lengths, "q_offset": q_offset}
        build = lambda: self.estimate(q, k, line_scores=line_scores, **at)

        def sparse():
            index = build()
            attend = block_sparse_attention
            return attend(q, k, v, index, implementation=self.implementation, **at), index

        def everything():
            like = jax.eval_shape(build)  # what does not fit is told at any length
            attend = DenseAttention(block_q=self.block_q, implementation=self.implementation)
            return attend(q, k, v, **at), dense_like(like, *sizes, **at)

        sizes = (q.shape[1], k.shape[1])
        break_even = self.keys_to_break_even()
        if fallback.too_short(*sizes, break_even):
            return everything()
        if not fallback.in_doubt(*sizes, break_even):
            return sparse()
        return jax.lax.cond(fallback.pays(self.patterns, *sizes, break_even), sparse, everything)

    def keys_to_break_even(self) -> int:
        """`break_even`, that of the default device if None."""
        if self.break_even is not None:
            return self.break_even
        return 0 if self.dense_above is None else _device_break_even()

    def estimate(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        **how: Any,
    ) -> BlockSparseIndex:
        """The index alone, of any length; `how` goes to `build_index`."""
        shape = jnp.shape(self.patterns.kind)
        if len(shape) != 1:
            raise ValueError(
                f"these patterns are [layers, heads] {shape}: call `attention.layer(i)(q, k, v)`"
            )
        if shape[0] != q.shape[2]:
            raise ValueError(f"the patterns are for {shape[0]} heads, but `q` has {q.shape[2]}")
        if self.stagger is not False and self.block_q % (2 * ALIGNMENT):
            raise ValueError(
                f"`stagger` needs `block_q` to be a multiple of {2 * ALIGNMENT}, got {self.block_q}"
            )
        wide = q.shape[3] > _WIDEST_STAGGERED
        blocks = 128 if self.patterns.max_blocks else 96
        return build_index(
            jax.tree.map(jnp.asarray, self.patterns), q, k, block_q=self.block_q,
            block_kv=self.block_kv or (64 if wide else blocks), last_q=LAST_Q,
            dense_above=self.dense_above,
            stagger=not wide if self.stagger is None else self.stagger, **how,
        )  # fmt: skip


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """Dense causal attention, as the list of all tiles: an AttentionFn for any model."""

    block_q: int = dataclasses.field(default=128, metadata={"static": True})
    block_kv: int | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    layer = take_layer
    __call__ = attend_for_output

    def attend(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], BlockSparseIndex]:
        """The output and the (full) index; raises ValueError if shapes disagree."""
        check_attention_shapes(q, k, v)
        batch, q_len, heads, _ = q.shape
        index = dense_index(
            batch, heads, q_len, k.shape[1], lengths=lengths, q_offset=q_offset,
            block_q=self.block_q,
            block_kv=self.block_kv or (64 if q.shape[3] > _WIDEST_STAGGERED else 128),
        )  # fmt: skip
        out = block_sparse_attention(
            q, k, v, index, lengths=lengths, q_offset=q_offset, implementation=self.implementation
        )
        return out, index


def vertical_slash_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    vertical_size: int,
    slash_size: int,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
) -> Float[Array, "batch q_len heads head_dim"]:
    """Vertical-slash attention with one budget for all heads (paper, Algorithms 2, 4 and 5).

    Raises:
        ValueError: shapes disagree or a budget is out of range.
    """
    pattern = VerticalSlash(vertical_size=vertical_size, slash_size=slash_size)
    patterns = HeadPatterns.uniform(pattern, num_layers=1, num_heads=q.shape[2])
    return SparseAttention(patterns).layer(0)(q, k, v, lengths=lengths, q_offset=q_offset)


class VisitedPairs(NamedTuple):
    """How many (query, key) pairs a layer visited; sums over chunks of a prompt stay meaningful."""

    visited: Float[Array, "batch heads"]
    causal: Float[Array, "batch heads"]


def observe_density(
    attention: Any,
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], VisitedPairs]:
    """Attends and counts: the `observe` function with which a model's prefill reports density."""
    out, index = attention.attend(q, k, v, lengths=lengths, q_offset=q_offset)
    pairs = index.visited_pairs(q.shape[1], k.shape[1], lengths=lengths, q_offset=q_offset)
    return out, VisitedPairs(*pairs)
