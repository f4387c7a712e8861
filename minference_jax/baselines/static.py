"""Static indices: the lines of another prompt ("Ours w/ static" in the paper's Tables 2 to 5)."""

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.attention import SparseAttention, attend_for_output, take_layer
from minference_jax.index import lines
from minference_jax.index.select import compact
from minference_jax.patterns import HeadPatterns
from pallas_kernels import BlockSparseIndex
from pallas_kernels.block_sparse_attention.index import resolve_lengths
from pallas_kernels.common.checks import check_attention_shapes, check_lengths

# Filler of unused places: a line beyond every prompt.
NO_LINE = 2**30


class StaticLines(NamedTuple):
    """The lines of every head; those at or beyond a prompt's length fall away there.

    Attributes:
        columns: key columns, ascending, then NO_LINE.
        distances: distances from query to key, ascending, then NO_LINE.
    """

    columns: Int[Array, "*layers heads max_columns"]
    distances: Int[Array, "*layers heads max_distances"]


def static_lines(
    q: Float[Array, "1 length heads head_dim"],
    k: Float[Array, "1 length kv_heads head_dim"],
    patterns: HeadPatterns,
    *,
    max_distances: int,
    lengths: Int[Array, " 1"] | None = None,
) -> StaticLines:
    """The lines that one layer's heads take on a calibration prompt; jittable.

    Args:
        q: queries of the prompt, after rotary embedding.
        k: keys of the prompt.
        patterns: the layer's patterns (arrays [heads]).
        max_distances: room for the distances of a head; the budgets must stay within it.
        lengths: real tokens of the prompt, all if None.

    Raises:
        ValueError: shapes disagree, or there is more than one prompt.
    """
    check_attention_shapes(q, k, k)
    check_lengths(lengths, q.shape[0], k.shape[1])
    if q.shape[0] != 1:
        raise ValueError(f"lines come from one calibration prompt, got a batch of {q.shape[0]}")
    lengths, q_offset = resolve_lengths(1, q.shape[1], k.shape[1], lengths, None)
    scores = lines.last_query_scores(q, k, lengths=lengths, q_offset=q_offset, last_q=lines.LAST_Q)
    vertical, slash = lines.choose_lines(*scores, patterns, lengths=lengths)
    position = jnp.arange(k.shape[1], dtype=jnp.int32)
    numbers = lambda mask, size: jax.vmap(lambda m: compact(position, m, size, NO_LINE))(mask[0])
    return StaticLines(numbers(vertical, patterns.max_columns), numbers(slash, max_distances))


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StaticAttention:
    """Sparse attention whose vertical-slash heads visit the lines of another prompt.

    An AttentionFn. Heads of other kinds are those of `sparse`; block-sparse heads choose their
    blocks on each prompt still. `models.common.static.static_attention` makes one from a model and
    a calibration prompt.

    Attributes:
        sparse: patterns and how they run; `[layers, heads]`, or one layer's `[heads]`.
        lines: the lines that take the place of its estimation.
    """

    sparse: SparseAttention
    lines: StaticLines

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

        Raises:
            ValueError: as `SparseAttention.attend`, or the lines are for another number of heads.
        """
        shape = jnp.shape(self.lines.columns)
        if len(shape) != 2:
            raise ValueError(f"these lines are [layers, heads, ...] {shape}: take one `layer(i)`")
        if shape[0] != q.shape[2]:
            raise ValueError(f"the lines are for {shape[0]} heads, but `q` has {q.shape[2]}")
        marks = [_marks(x, q.shape[0], k.shape[1]) for x in self.lines]
        return self.sparse.attend(
            q, k, v, lengths=lengths, q_offset=q_offset, line_scores=(marks[0], marks[1])
        )


def _marks(
    numbers: Int[Array, "heads most"], batch: int, kv_len: int
) -> Float[Array, "batch heads kv_len"]:
    """Scores of which exactly the given lines are taken: negative ones never are."""
    nothing = jnp.full(kv_len, -1.0, jnp.float32)
    marks = jax.vmap(lambda at: nothing.at[at].set(1.0, mode="drop"))(numbers)
    return jnp.broadcast_to(marks, (batch, *marks.shape))
