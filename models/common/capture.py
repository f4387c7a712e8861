"""What attention sees, read out of a model while it reads a prompt: arrays for a pattern search."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from minference_jax.types import AttentionFn


class QKV(NamedTuple):
    """Queries, keys and values of one attention call, after rotary embedding."""

    q: Float[Array, "batch q_len heads head_dim"]
    k: Float[Array, "batch kv_len kv_heads head_dim"]
    v: Float[Array, "batch kv_len kv_heads head_dim"]


def capture_qkv(
    attention: AttentionFn,
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"] | None,
    q_offset: Int[Array, ""] | None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], QKV]:
    """Runs the attention and hands out what it was given, as `prefill(..., observe=capture_qkv)`.

    `prefill` then returns a `QKV` whose arrays are stacked over layers, `[L, batch, ...]`: three
    times the prompt's activations for every layer, so a long prompt needs the memory for it. In
    chunked prefill `k` and `v` are the whole cache of each chunk; capture without `chunk_size`.
    """
    return attention(q, k, v, lengths=lengths, q_offset=q_offset), QKV(q, k, v)
