"""What attention sees, read out of a model while it reads a prompt.

`capture_qkv` is for `prefill(..., observe=capture_qkv)`, which keeps all layers. A pattern search
needs one layer at a time: `embed_prompt`, then for each layer `layer_qkv` and `layer_output`.
`read_hidden` and `extend_hidden` keep many rows of the stream behind the layers, whose logits
(`row_logits`) would not fit into memory together.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache import KVCompression
from minference_jax.types import AttentionFn
from models.common.cache import KVCache, kept_tokens
from models.common.checks import (
    check_attention,
    check_compression,
    check_extension,
    check_mesh,
    check_prompt,
)
from models.common.config import DecoderConfig
from models.common.passes import (
    Observe,
    run_embedding,
    run_extend_hidden,
    run_hidden,
    run_logits,
)
from models.common.stack import Params, run_layer


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


def embed_prompt(
    params: Params,
    tokens: Int[Array, "batch s"],
    *,
    config: DecoderConfig,
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch s embed"]:
    """The residual stream of prompts before the first layer.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        lengths: real tokens of each prompt.

    Raises:
        ValueError: for prompts that the model cannot read, as `prefill`.
    """
    check_prompt(tokens, lengths, config)
    return run_embedding(params, tokens, config=config)


@functools.partial(jax.jit, static_argnames="config")
def layer_qkv(
    params: Params,
    layer: Int[Array, ""] | int,
    x: Float[Array, "batch s embed"],
    *,
    config: DecoderConfig,
    lengths: Int[Array, " batch"],
) -> QKV:
    """Queries, keys and values of one layer.

    Args:
        params: the tree described in `models.common.decoder`.
        layer: its number.
        x: the residual stream before it.
        config: the model's hyper-parameters.
        lengths: real tokens of each prompt.
    """

    def attend(q, k, v):
        return jnp.zeros_like(q), QKV(q, k, v)

    return run_layer(params, layer, x, lengths, config=config, attend=attend)[1]


@functools.partial(jax.jit, static_argnames="config")
def layer_output(
    params: Params,
    layer: Int[Array, ""] | int,
    x: Float[Array, "batch s embed"],
    attention: AttentionFn,
    *,
    config: DecoderConfig,
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch s embed"]:
    """The residual stream after one layer; `attention` is that of this layer alone."""

    def attend(q, k, v):
        return attention(q, k, v, lengths=lengths, q_offset=None), None

    return run_layer(params, layer, x, lengths, config=config, attend=attend)[0]


@jax.jit
def output_gram(
    params: Params, layer: Int[Array, ""] | int
) -> Float[Array, "heads head_dim head_dim"]:
    """W W^T of each head's slice W [head_dim, embed] of one layer's output projection, float32.

    A change `d` of a head's output moves the residual stream by `d W`, of squared length
    `d (W W^T) d`.

    Args:
        params: the tree described in `models.common.decoder`.
        layer: its number.
    """
    kernel = params["layers"]["attention"]["o_proj"]["kernel"][layer].astype(jnp.float32)
    return jnp.einsum("hde,hfe->hdf", kernel, kernel, precision="highest")


def read_hidden(
    params: Params,
    tokens: Int[Array, "batch s"],
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    lengths: Int[Array, " batch"],
    rope_length: Int[Array, " batch"],
    rows: int,
    capacity: int,
    observe: Observe,
    compression: KVCompression | None = None,
) -> tuple[Float[Array, "batch rows embed"], KVCache, Any]:
    """Reads prompts, as `models.common.decoder.prefill`, and keeps hidden rows.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.
        lengths: real tokens of each prompt.
        rope_length: the length each prompt will have in the end, as in `prefill`.
        rows: how many of the last real rows to keep, 1 to s.
        capacity: tokens the cache can hold.
        observe: called instead of each layer's attention, as in `prefill`.
        compression: what the cache keeps of the prompts, as in `prefill`; no row depends on it.

    Returns:
        The last real rows of the residual stream behind the layers (of a prompt with fewer: all of
        them, and padding after them), the cache, and what was observed, stacked over layers.

    Raises:
        ValueError: as `prefill`, and for rows or a capacity that do not suit the prompts.
    """
    check_prompt(tokens, lengths, config)
    check_attention(attention_fn, config.num_layers)
    check_mesh(attention_fn, params, config, whole=False, what="`read_hidden`")
    length = tokens.shape[1]
    if not 1 <= rows <= length:
        raise ValueError(f"`rows` must be within 1..{length}, the prompts' length; got {rows}")
    check_compression(compression, config.num_layers, length, None)
    if capacity < (kept := kept_tokens(compression, length)):
        what = "the prompts' length" if compression is None else "what `compression` keeps"
        raise ValueError(f"`capacity` must be at least {kept}, {what}; got {capacity}")
    return run_hidden(
        params, tokens, lengths, rope_length, config=config, attention_fn=attention_fn, rows=rows,
        capacity=capacity, observe=observe, compression=compression,
    )  # fmt: skip


def extend_hidden(
    params: Params,
    tokens: Int[Array, "1 s"],
    cache: KVCache,
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
) -> tuple[Float[Array, "1 s embed"], KVCache]:
    """Reads more tokens onto a cache, as `models.common.decoder.extend`, and keeps hidden rows.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: one row, which follows the tokens of the cache, without padding.
        cache: of one row; it stays as it is.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.

    Returns:
        All rows of the residual stream behind the layers, and the cache that holds the tokens.

    Raises:
        ValueError: as `extend`.
    """
    check_extension(tokens, None, cache, config)
    check_attention(attention_fn, config.num_layers)
    check_mesh(attention_fn, params, config, whole=False, what="`extend_hidden`")
    return run_extend_hidden(params, tokens, cache, config=config, attention_fn=attention_fn)


def row_logits(
    params: Params, x: Float[Array, "*rows embed"], *, config: DecoderConfig
) -> Float[Array, "*rows vocab"]:
    """Logits, fp32, of rows that were kept; memory grows with rows times vocabulary."""
    return run_logits(params, x, config=config)
