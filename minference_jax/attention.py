"""Attention callables."""

import dataclasses

import jax
import jax.numpy as jnp
from typing import no_type_check


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """Causal dense attention (placeholder until the list-driven kernel is in place)."""

    def __call__(self, q, k, v, *, lengths=None, q_offset=None):
        batch, q_len, heads, head_dim = q.shape
        kv_len, kv_heads = k.shape[1:3]
        offset = kv_len - q_len if q_offset is None else q_offset
        position = offset + jnp.arange(q_len)
        key = jnp.arange(kv_len)
        visible = key[None, None, :] <= position[None, :, None]
        if lengths is not None:
            visible = visible & (key[None, None, :] < lengths[:, None, None])
        grouped = q.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
        scores = jnp.einsum("bqngd,bknd->bngqk", grouped, k.astype(jnp.float32)) * head_dim**-0.5
        scores = jnp.where(visible[:, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bngqk,bknd->bqngd", weights, v.astype(jnp.float32))
        return out.reshape(q.shape).astype(q.dtype)
