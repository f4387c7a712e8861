"""Attention callables of the adaptive patterns, and of indices made elsewhere."""

import dataclasses
from typing import Self, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.break_even import device_break_even
from minference_jax.adaptive.layout import Estimator, Layout
from minference_jax.attention import DenseAttention, attend_for_output, take_layer
from minference_jax.index.dense import make_costly_dense
from minference_jax.index.fallback import too_short
from pallas_kernels import BlockSparseIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.index import resolve_lengths
from pallas_kernels.common.checks import check_attention_shapes, check_lengths


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveAttention:
    """Sparse causal attention over what an estimator finds for each prompt: an AttentionFn.

    With parameters that are numbers, or arrays for the heads of a layer, it is the attention of one
    layer. A model takes `attention.for_layers(num_layers)`, where parameters may also be arrays
    `[layers, heads]` or `[layers, 1]`.

    Attributes:
        estimator: how the index is found; a pytree, its parameters are data.
        layout: tile sizes, sharing between heads, capacity (static).
        implementation: which kernel runs; None chooses one for the default device (static).
        dense_above: a query tile that would execute more than this many times the key tiles of
            dense attention visits every key; None keeps every list (static).
        break_even: keys up to which a layer attends densely, because estimating takes as long as it
            could save; 0 always estimates. Where fewer queries than keys come, it is the keys of a
            whole prompt with as many pairs. None is known for thresholds on Hopper GPUs (see
            `device_break_even`); 0 elsewhere, and where `dense_above` is None (static).
    """

    estimator: Estimator
    layout: Layout = dataclasses.field(default_factory=Layout, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    dense_above: float | None = dataclasses.field(default=1.0, metadata={"static": True})
    break_even: int | None = dataclasses.field(default=None, metadata={"static": True})

    def for_layers(self, num_layers: int) -> Self:
        """The attention of a model: every parameter with a leading [layers] axis.

        A parameter that is a number, or an array for the heads of a layer, is the same for all
        layers; one that is `[layers, heads]` or `[layers, 1]` stays.

        Raises:
            ValueError: a parameter is for another number of layers.
        """

        def repeat(x):
            shape = jnp.shape(x)
            if len(shape) > 1 and shape[0] != num_layers:
                raise ValueError(f"a parameter is for {shape[0]} layers, not for {num_layers}")
            return x if len(shape) > 1 else jnp.broadcast_to(x, (num_layers, *(shape or (1,))))

        return jax.tree.map(repeat, self)

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
        """The output and the index that was visited.

        Whether anything is estimated follows from the shapes alone: rows that are padding count.

        Raises:
            ValueError: shapes disagree, a parameter is for another number of heads or for several
                layers, or the layout does not suit the estimator.
        """
        check_attention_shapes(q, k, v)
        check_lengths(lengths, q.shape[0], k.shape[1])
        if too_short(q.shape[1], k.shape[1], self.keys_to_break_even(*q.shape[2:])):
            jax.eval_shape(self.estimate, q, k)  # what does not fit is told at any length
            dense = DenseAttention(implementation=self.implementation)
            return dense.attend(q, k, v, lengths=lengths, q_offset=q_offset)
        index = self.estimate(q, k, lengths=lengths, q_offset=q_offset)
        out = block_sparse_attention(
            q, k, v, index, lengths=lengths, q_offset=q_offset, implementation=self.implementation
        )
        return out, index

    def keys_to_break_even(self, heads: int, head_dim: int) -> int:
        """`break_even`, that of the default device for a layer of this size if None."""
        if self.break_even is not None:
            return self.break_even
        return 0 if self.dense_above is None else device_break_even(self.estimator, heads, head_dim)

    def estimate(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> BlockSparseIndex:
        """The index alone, with the query tiles that fall back to dense; of any length."""
        kv_len = k.shape[1]
        lengths, q_offset = resolve_lengths(q.shape[0], q.shape[1], kv_len, lengths, q_offset)
        index = self.estimator(q, k, lengths=lengths, q_offset=q_offset, layout=self.layout)
        if self.dense_above is None:
            return index
        return make_costly_dense(index, self.dense_above, kv_len, q_offset=q_offset)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class IndexedAttention:
    """Sparse causal attention over an index made elsewhere, visited exactly as it is.

    For a model, the index's arrays have a leading [layers] axis. An index is made for one prompt
    length: in chunked prefill every chunk needs its own, so prefill the prompt whole. Check an
    index from other code with `pallas_kernels.block_sparse_attention.index.validate`.

    Attributes:
        index: what each query tile of each head visits.
        implementation: which kernel runs; None chooses one for the default device (static).
    """

    index: BlockSparseIndex
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
        """The output and the index.

        Raises:
            ValueError: the index is that of a whole model, or not one for these shapes.
        """
        if self.index.begin.ndim != 3:
            raise ValueError(
                "the index must be [batch, heads, query tiles], but `begin` is "
                f"{self.index.begin.shape}: call `attention.layer(i)(q, k, v)`"
            )
        out = block_sparse_attention(
            q, k, v, self.index, lengths=lengths, q_offset=q_offset,
            implementation=self.implementation,
        )  # fmt: skip
        return out, self.index
