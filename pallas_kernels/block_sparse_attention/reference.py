"""The definition: masked dense attention over the exact visited mask, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """Output and log-sum-exp; memory grows with q_len * kv_len."""
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    mask = index.to_mask(q_len, kv_len, lengths=lengths, q_offset=q_offset)
    group = heads // kv_heads
    mask = mask.reshape(batch, kv_heads, group, q_len, kv_len)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(batch, q_len, kv_heads, group, head_dim)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bqngd,bknd->bngqk", q, k, precision=highest) * head_dim**-0.5
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isinf(lse), 0.0, lse)[..., None]), 0.0)
    out = jnp.einsum("bngqk,bknd->bqngd", weights, v, precision=highest)
    return out.reshape(batch, q_len, heads, head_dim), lse.reshape(batch, heads, q_len)
