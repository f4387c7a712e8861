"""A pre-norm decoder with rotary attention, as pure functions of a parameter tree.

The Llama and GLM families share it; they differ in hyper-parameters and in the names of checkpoints. The
tree is a plain nested dict, the parameters of all layers stacked on their first axis (L layers, V words,
D width, F MLP width, H and KV heads, h head_dim):

    embed.embedding [V, D]; final_norm.scale [D]; lm_head.kernel [D, V] (absent when tied)
    layers.input_norm.scale [L, D]; layers.post_attention_norm.scale [L, D]
    layers.attention.{q,k,v}_proj.kernel [L, D, H or KV, h] (and .bias [L, H or KV, h])
    layers.attention.o_proj.kernel [L, H, h, D] (and .bias [L, D])
    layers.mlp.{gate,up}_proj.kernel [L, D, F]; layers.mlp.down_proj.kernel [L, F, D] (and .bias)

Computation is in the parameters' dtype, but norms, rotations, softmax and logits in fp32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minference_jax.types import AttentionFn
from models.common.cache import KVCache, attend_cached
from models.common.checks import check_attention, check_cache_room, check_prompt
from models.common.config import DecoderConfig
from models.common.layers import DecoderLayer, Ends
from models.common.rope import rotation_tables

Params = dict[str, Any]
Observe = Callable[..., tuple[Array, Any]]


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
    """Computes the logits of every position, fp32; for small inputs, as they grow with the vocabulary.

    Args:
        params: the tree described above.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.
        lengths: real tokens of each row, all of them if None.
        rope_length: length that decides dynamic rotary frequencies, `lengths` if None.

    Raises:
        ValueError: for an empty prompt, one beyond the model's context, tokens outside the vocabulary,
            lengths outside 1..s, or an attention for another number of layers.
    """
    rope_length = _check(tokens, lengths, rope_length, config=config, attention_fn=attention_fn)
    return _forward(params, tokens, lengths, rope_length, config=config, attention_fn=attention_fn)


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
) -> tuple[Float[Array, "batch vocab"], KVCache] | tuple[Float[Array, "batch vocab"], KVCache, Any]:
    """Reads prompts: the logits after each row's last real token, and the cache to go on from.

    Args:
        params: the tree described above.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: a pytree whose array leaves have a leading `[layers]` axis.
        lengths: real tokens of each row, all of them if None.
        capacity: tokens the cache can hold, `s` if None.
        rope_length: the length each row will have in the end, `lengths` if None. It decides dynamic
            rotary frequencies once for the row's whole life, so generation passes prompt + new tokens.
        chunk_size: prompt tokens computed at once, all if None. Chunks run through one compiled body.
        observe: `observe(attention, q, k, v, *, lengths, q_offset) -> (out, anything)`, called instead of
            each layer's attention, with the same arguments. It is how densities or q, k, v are read.

    Returns:
        `(logits [batch, vocab] fp32, cache)`, and with `observe` a third item: `anything`, stacked over
        layers `[L, ...]`, with `chunk_size` over layers and chunks `[L, chunks, ...]`.

    Raises:
        ValueError: as `forward`, and for a capacity or chunk size that does not fit.
    """
    length = tokens.shape[1]
    capacity = length if capacity is None else capacity
    if capacity < length:
        raise ValueError(
            f"`capacity` ({capacity}) must be at least the prompt's length ({length} tokens)"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    rope_length = _check(tokens, lengths, rope_length, config=config, attention_fn=attention_fn)
    logits, cache, observed = _prefill(
        params,
        tokens,
        lengths,
        rope_length,
        config=config,
        attention_fn=attention_fn,
        capacity=capacity,
        chunk_size=chunk_size,
        observe=observe,
    )
    return (logits, cache) if observe is None else (logits, cache, observed)


def decode_step(
    params: Params, token: Int[Array, " batch"], cache: KVCache, *, config: DecoderConfig
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Reads one more token of each row with dense attention over the cache.

    Args:
        params: the tree described above.
        token: the next token of each row, written at the row's own length.
        cache: what `prefill` or the last step returned.
        config: the model's hyper-parameters.

    Returns:
        The logits after the token, fp32, and the cache that holds it.

    Raises:
        ValueError: when a row of the cache is full (under jit, where lengths are unknown, its logits
            turn NaN instead).
    """
    check_cache_room(cache)
    return _decode_step(params, token, cache, config=config)


def _check(tokens, lengths, rope_length, *, config, attention_fn) -> Int[Array, " batch"]:
    check_prompt(tokens, lengths, config)
    check_attention(attention_fn, config.num_layers)
    if rope_length is not None:
        return rope_length
    return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else lengths


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens, lengths, rope_length, *, config, attention_fn):
    ends = _ends(params, config)
    cos, sin = _tables(tokens.shape, 0, rope_length, config)

    def attend(attention, q, k, v, layer, state):
        return attention(q, k, v, lengths=lengths, q_offset=None), state, None

    x, _, _ = _scan_layers(
        params, ends.embed(tokens), cos, sin, attention_fn, attend, None, config=config
    )
    return ends.logits(x)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "chunk_size", "observe"))
def _prefill(
    params, tokens, lengths, rope_length, *, config, attention_fn, capacity, chunk_size, observe
):
    observe = _call_attention if observe is None else observe
    whole = chunk_size is None or chunk_size >= tokens.shape[1]
    read = _read_whole if whole else functools.partial(_read_chunks, chunk_size=chunk_size)
    last, keys, values, observed = read(
        params,
        tokens,
        lengths,
        rope_length,
        config=config,
        attention_fn=attention_fn,
        capacity=capacity,
        observe=observe,
    )
    if whole and chunk_size is not None:
        observed = jax.tree.map(lambda a: a[:, None], observed)
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    cache = KVCache(
        keys=keys,
        values=values,
        lengths=lengths.astype(jnp.int32),
        rope_length=rope_length.astype(jnp.int32),
    )
    return _ends(params, config).logits(last), cache, observed


def _read_whole(params, tokens, lengths, rope_length, *, config, attention_fn, capacity, observe):
    """The whole prompt at once; the cache leaves the layer scan as its stacked output."""
    cos, sin = _tables(tokens.shape, 0, rope_length, config)
    room = ((0, 0), (0, capacity - tokens.shape[1]), (0, 0), (0, 0))

    def attend(attention, q, k, v, layer, state):
        out, seen = observe(attention, q, k, v, lengths=lengths, q_offset=None)
        return out, state, (jnp.pad(k, room), jnp.pad(v, room), seen)

    x = _ends(params, config).embed(tokens)
    x, _, (keys, values, observed) = _scan_layers(
        params, x, cos, sin, attention_fn, attend, None, config=config
    )
    last = x[:, -1] if lengths is None else _row_at(x, lengths - 1)
    return last, keys, values, observed


def _read_chunks(
    params, tokens, lengths, rope_length, *, config, attention_fn, capacity, observe, chunk_size
):
    """Chunk after chunk against the cache, which is carried and updated in place."""
    batch, length = tokens.shape
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    num_chunks = -(-length // chunk_size)
    padded = num_chunks * chunk_size
    chunks = jnp.pad(tokens, ((0, 0), (0, padded - length))).reshape(batch, num_chunks, chunk_size)
    ends = _ends(params, config)
    dtype = ends.embed.embedding.dtype
    # The last chunk is written whole, so the cache has room for its padding meanwhile.
    room = (config.num_layers, batch, max(capacity, padded), config.num_kv_heads, config.head_dim)

    def read_chunk(carry, chunk):
        keys, values, last = carry
        tokens, q_offset = chunk
        real = jnp.minimum(lengths, q_offset + chunk_size)
        cos, sin = _tables(tokens.shape, q_offset, rope_length, config)

        def attend(attention, q, k, v, layer, state):
            start = (layer, 0, q_offset, 0, 0)
            state = jax.tree.map(
                lambda store, new: jax.lax.dynamic_update_slice(store, new[None], start),
                state,
                (k, v),
            )
            k, v = jax.tree.map(lambda store: store[layer], state)
            out, seen = observe(attention, q, k, v, lengths=real, q_offset=q_offset)
            return out, state, seen

        x, (keys, values), seen = _scan_layers(
            params, ends.embed(tokens), cos, sin, attention_fn, attend, (keys, values),
            config=config,
        )  # fmt: skip
        row = lengths - 1 - q_offset
        here = (row >= 0) & (row < chunk_size)
        last = jnp.where(here[:, None], _row_at(x, jnp.clip(row, 0, chunk_size - 1)), last)
        return (keys, values, last), seen

    start = (
        jnp.zeros(room, dtype),
        jnp.zeros(room, dtype),
        jnp.zeros((batch, config.embed_dim), dtype),
    )
    offsets = jnp.arange(num_chunks, dtype=jnp.int32) * chunk_size
    (keys, values, last), observed = jax.lax.scan(
        read_chunk, start, (jnp.moveaxis(chunks, 1, 0), offsets)
    )
    observed = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), observed)
    return last, keys[:, :, :capacity], values[:, :, :capacity], observed


@functools.partial(jax.jit, static_argnames="config")
def _decode_step(params, token, cache, *, config):
    ends = _ends(params, config)
    positions = cache.lengths[:, None]
    cos, sin = rotation_tables(config.rope, positions, cache.rope_length)
    rows = jnp.arange(token.shape[0])

    def attend(attention, q, k, v, layer, state):
        state = jax.tree.map(
            lambda store, new: store.at[layer, rows, cache.lengths].set(new[:, 0], mode="drop"),
            state,
            (k, v),
        )
        k, v = jax.tree.map(lambda store: store[layer], state)
        return attend_cached(q, k, v, cache.lengths + 1), state, None

    x, (keys, values), _ = _scan_layers(
        params, ends.embed(token[:, None]), cos, sin, (), attend, (cache.keys, cache.values),
        config=config,
    )  # fmt: skip
    logits = ends.logits(x[:, 0])
    logits = jnp.where((cache.lengths < cache.capacity)[:, None], logits, jnp.nan)
    return logits, KVCache(keys, values, cache.lengths + 1, cache.rope_length)


def _scan_layers(params, x, cos, sin, attention_fn, attend, state, *, config):
    """Runs all layers: `attend(attention, q, k, v, layer, state) -> (out, state, output)`.

    Returns:
        The residual stream, the final state, and `output` stacked over layers.
    """
    graph = _layer_graph(config)

    def body(carry, layer):
        x, state = carry
        layer_params, attention, index = layer

        def call(q, k, v):
            out, new_state, output = attend(attention, q, k, v, index, state)
            return out, (new_state, output)

        x, (state, output) = nnx.merge(graph, layer_params)(x, cos, sin, call)
        return (x, state), output

    layers = (params["layers"], attention_fn, jnp.arange(config.num_layers, dtype=jnp.int32))
    (x, state), outputs = jax.lax.scan(body, (x, state), layers)
    return x, state, outputs


@functools.cache
def _layer_graph(config: DecoderConfig):
    layer = nnx.eval_shape(lambda: DecoderLayer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


@functools.cache
def _ends_graph(config: DecoderConfig):
    ends = nnx.eval_shape(lambda: Ends(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.split(ends)[0]


def _ends(params: Params, config: DecoderConfig) -> Ends:
    return nnx.merge(
        _ends_graph(config), {name: leaf for name, leaf in params.items() if name != "layers"}
    )


def _values(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _tables(shape, q_offset, rope_length, config):
    positions = jnp.broadcast_to(q_offset + jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    return rotation_tables(config.rope, positions, rope_length)


def _row_at(x: Float[Array, "batch s embed"], row: Int[Array, " batch"]) -> Array:
    return jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]


def _call_attention(attention, q, k, v, *, lengths, q_offset):
    return attention(q, k, v, lengths=lengths, q_offset=q_offset), None
