"""A pre-norm decoder with rotary attention, as pure functions of a parameter tree.

The Llama and GLM families share it; they differ in hyper-parameters and in the names of
checkpoints. The tree is a plain nested dict, the parameters of all layers stacked on their first
axis (L layers, V words, D width, F MLP width, H and KV heads, h head_dim):

    embed.embedding [V, D]; final_norm.scale [D]; lm_head.kernel [D, V] (absent when tied)
    layers.input_norm.scale [L, D]; layers.post_attention_norm.scale [L, D]
    layers.attention.{q,k,v}_proj.kernel [L, D, H or KV, h] (and .bias [L, H or KV, h])
    layers.attention.o_proj.kernel [L, H, h, D] (and .bias [L, D])
    layers.mlp.{gate,up}_proj.kernel [L, D, F]; layers.mlp.down_proj.kernel [L, F, D] (and .bias)

Computation is in the parameters' dtype, but norms, rotations, softmax and logits in fp32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache import KVCompression
from minference_jax.types import AttentionFn
from models.common.cache import KVCache, kept_tokens
from models.common.checks import (
    check_attention,
    check_cache_room,
    check_compression,
    check_continuation,
    check_extension,
    check_mesh,
    check_prompt,
)
from models.common.config import DecoderConfig
from models.common.layers import DecoderLayer, Ends
from models.common.passes import Observe, run_decode_step, run_extend, run_forward, run_prefill
from models.common.stack import Params


def abstract_params(config: DecoderConfig, dtype: Any) -> Params:
    """Returns the parameter tree with `jax.ShapeDtypeStruct` leaves, at no cost at any size."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def init_params(config: DecoderConfig, key: Array, dtype: Any) -> Params:
    """Returns random parameters (Flax's default initialisers)."""
    ends_key, layers_key = jax.random.split(key)

    def layer(key: Array) -> Params:
        return _values(DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(key)))

    ends = _values(Ends(config, dtype=dtype, rngs=nnx.Rngs(ends_key)))
    return {**ends, "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers))}


def forward(
    params: Params,
    tokens: Int[Array, "batch s"],
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    lengths: Int[Array, " batch"] | None = None,
    rope_length: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch s vocab"]:
    """Computes fp32 logits of every position: memory grows with length times vocabulary.

    Args:
        params: the tree described above.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.
        lengths: real tokens of each row, all of them if None.
        rope_length: length that decides dynamic rotary frequencies, `lengths` if None.

    Raises:
        ValueError: for an empty prompt, one beyond the model's context, tokens outside the
            vocabulary, lengths outside 1..s, or an attention for another number of layers.
    """
    rope_length = _check(tokens, lengths, rope_length, config=config, attention_fn=attention_fn)
    check_mesh(attention_fn, params, config, whole=False, what="`forward`")
    return run_forward(
        params, tokens, lengths, rope_length, config=config, attention_fn=attention_fn
    )


def prefill(
    params: Params,
    tokens: Int[Array, "batch s"],
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    lengths: Int[Array, " batch"] | None = None,
    capacity: int | None = None,
    rope_length: Int[Array, " batch"] | None = None,
    chunk_size: int | None = None,
    observe: Observe | None = None,
    compression: KVCompression | None = None,
) -> tuple[Float[Array, "batch vocab"], KVCache] | tuple[Float[Array, "batch vocab"], KVCache, Any]:
    """Reads prompts: the logits after each row's last real token, and the cache to go on from.

    Args:
        params: the tree described above.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis. A
            `ShardedAttention` spreads all of the prefill over its mesh, which the parameters have
            to be on (`load_model(…, mesh=mesh)`, `shard_params`).
        lengths: real tokens of each row, all of them if None.
        capacity: tokens the cache can hold; if None, those of the prompt that it keeps: `s`, or
            fewer with `compression`. Where prompts are split over devices, so is the cache, and it
            has as many slots as that takes, or more.
        rope_length: the length each row will have in the end, `lengths` if None. It decides dynamic
            rotary frequencies once for the row's whole life, so generation passes prompt + new
            tokens.
        chunk_size: prompt tokens computed at once, all if None. Chunks run through one compiled
            body.
        observe: `observe(attention, q, k, v, *, lengths, q_offset) -> (out, anything)`, called
            instead of each layer's attention, with the same arguments. It is how densities or q, k,
            v are read. Where prompts are split over devices, rows come in `balanced_order`, padded.
        compression: what each layer keeps of the prompt, everything if None; a pytree whose array
            leaves have a leading `[layers]` axis. The logits do not depend on it.

    Returns:
        `(logits [batch, vocab] fp32, cache)`, and with `observe` a third item: `anything`, stacked
        over layers `[L, ...]`, with `chunk_size` over layers and chunks `[L, chunks, ...]`.

    Raises:
        ValueError: as `forward`, for a capacity or chunk size that does not fit, for a compression
            for another number of layers, or together with a prompt in several chunks, and for what
            cannot run on the attention's mesh.
    """
    length = tokens.shape[1]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    check_compression(compression, config.num_layers, length, chunk_size)
    kept = kept_tokens(compression, length)
    capacity = kept if capacity is None else capacity
    check_continuation(compression, capacity)
    if capacity < kept:
        what = "the prompt's length" if compression is None else "what `compression` keeps"
        raise ValueError(f"`capacity` ({capacity}) must be at least {what} ({kept} tokens)")
    rope_length = _check(tokens, lengths, rope_length, config=config, attention_fn=attention_fn)
    whole = chunk_size is None or chunk_size >= length
    check_mesh(attention_fn, params, config, whole=whole, what="a prefill in chunks")
    logits, cache, observed = run_prefill(
        params,
        tokens,
        lengths,
        rope_length,
        config=config,
        attention_fn=attention_fn,
        capacity=capacity,
        chunk_size=chunk_size,
        observe=observe,
        compression=compression,
    )
    return (logits, cache) if observe is None else (logits, cache, observed)


def extend(
    params: Params,
    tokens: Int[Array, "batch s"],
    cache: KVCache,
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    lengths: Int[Array, " batch"] | None = None,
    observe: Observe | None = None,
) -> tuple[Float[Array, "batch vocab"], KVCache] | tuple[Float[Array, "batch vocab"], KVCache, Any]:
    """Reads more tokens onto a cache of one row: a further turn of a conversation, at once.

    The cache passed in stays as it is, so several continuations can be read onto copies of it.

    Args:
        params: the tree described above.
        tokens: one row, which follows the tokens of the cache, right-padded.
        cache: of one row; a compression may have dropped keys, then the attention sees those kept
            and the new ones as one sequence.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.
        lengths: real tokens, all of them if None.
        observe: called instead of each layer's attention, as in `prefill`.

    Returns:
        The logits after the last real token, fp32, and the cache that holds all real tokens; with
        `observe` a third item: `anything`, stacked over layers.

    Raises:
        ValueError: as `forward`; for several rows; when the cache has no room for the tokens and
            their padding (unknown, and so not told, under jit).
    """
    check_extension(tokens, lengths, cache, config)
    check_attention(attention_fn, config.num_layers)
    check_mesh(attention_fn, params, config, whole=False, what="`extend`")
    if lengths is None:
        lengths = jnp.full(1, tokens.shape[1], jnp.int32)
    logits, cache, observed = run_extend(
        params, tokens, lengths, cache, config=config, attention_fn=attention_fn, observe=observe
    )
    return (logits, cache) if observe is None else (logits, cache, observed)


def decode_step(
    params: Params, token: Int[Array, " batch"], cache: KVCache, *, config: DecoderConfig
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Reads one more token of each row with dense attention over the cache.

    Args:
        params: the tree described above.
        token: the next token of each row, at the position of the row's own length.
        cache: what `prefill` or the last step returned.
        config: the model's hyper-parameters.

    Returns:
        The logits after the token, fp32, and the cache that holds it.

    Raises:
        ValueError: when a row of the cache is full (under jit, where lengths are unknown, its
            logits turn NaN instead).
    """
    check_cache_room(cache)
    return run_decode_step(params, token, cache, config=config)


def _check(tokens, lengths, rope_length, *, config, attention_fn) -> Int[Array, " batch"]:
    check_prompt(tokens, lengths, config)
    check_attention(attention_fn, config.num_layers)
    if rope_length is not None:
        return rope_length
    return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else lengths


def _values(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
