"""The Top-K oracle: each row attends to its keys of largest score (paper, sections 2 and 3)."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.attention import attend_for_output, take_layer
from minference_jax.index.select import top_k_mask
from minference_jax.pairs import CountedPairs
from pallas_kernels.block_sparse_attention.index import resolve_lengths
from pallas_kernels.common.checks import check_attention_shapes, check_lengths
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKAttention:
    """Each row sees its `k` keys of largest exact score, and itself: an AttentionFn for analysis.

    It computes every score, so it is slower than dense attention; memory grows with
    `rows` times the keys. Of equal scores (to float32) the earlier key is taken.

    Attributes:
        k: keys of each row; the row's own comes on top where it is not among them (static).
        rows: query rows of a head at a time (static).
    """

    k: int = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(default=128, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a number out of range."""
        for name in ("k", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

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
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], CountedPairs]:
        """The output and how many pairs were visited; raises ValueError if shapes disagree."""
        check_attention_shapes(q, k, v)
        batch, q_len, heads, head_dim = q.shape
        kv_len, group = k.shape[1], heads // k.shape[2]
        check_lengths(lengths, batch, kv_len)
        lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
        rows = min(self.rows, q_len)
        chunks = cdiv(q_len, rows)
        parts = jnp.pad(q, ((0, 0), (0, chunks * rows - q_len), (0, 0), (0, 0)))
        parts = jnp.moveaxis(parts, 1, 2).reshape(batch * heads * chunks, rows, head_dim)
        k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))

        def one_chunk(args):
            number, q = args
            which, chunk = jnp.divmod(number, chunks)
            row, head = jnp.divmod(which, heads)
            position = q_offset + chunk * rows + jnp.arange(rows)
            at = (row, head // group)
            return _attend_rows(q, k[at], v[at], position, lengths[row], self.k)

        out, keys = jax.lax.map(one_chunk, (jnp.arange(batch * heads * chunks), parts))
        out = out.reshape(batch, heads, chunks * rows, head_dim)[:, :, :q_len]
        keys = keys.reshape(batch, heads, chunks * rows)[:, :, :q_len]
        everything = jnp.full((batch, heads), float(chunks * rows) * kv_len, jnp.float32)
        pairs = CountedPairs.of_rows(keys, everything, lengths=lengths, q_offset=q_offset)
        return jnp.moveaxis(out, 1, 2).astype(q.dtype), pairs


def _attend_rows(q, k, v, position, length, budget):
    """Output [rows, head_dim] and keys seen [rows], for some rows of a head."""
    product = lambda equation, *x: jnp.einsum(
        equation, *x, precision="highest", preferred_element_type=jnp.float32
    )
    key = jnp.arange(k.shape[0])[None, :]
    seen = (key <= position[:, None]) & (key < length)
    scores = jnp.where(seen, product("rd,kd->rk", q, k) * q.shape[1] ** -0.5, -jnp.inf)
    top = jnp.max(scores, axis=1, keepdims=True)
    # Positive numbers in the order of the scores; weights would not do, small ones are all 0.
    order = jnp.where(seen, 1.0 / (1.0 + top - scores), -1.0)
    chosen = jax.vmap(top_k_mask, in_axes=(0, None))(order, jnp.int32(budget))
    chosen |= seen & (key == position[:, None])
    weights = jnp.where(chosen, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return product("rk,kd->rd", weights / total, v.astype(jnp.float32)), jnp.sum(chosen, axis=1)
