"""The compiled passes behind `models.common.decoder`: prompts whole or in chunks, then more tokens.

`run_embedding` is for `models.common.capture`, which goes layer by layer, and `run_hidden`,
`run_extend_hidden` and `run_logits` for the rows that it keeps.

Callers have checked the arguments. Each pass scans the layers once (`models.common.stack`), with
the attention's array leaves next to the parameters, and differs in what `attend` does with a
layer's queries, keys and values.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache import KeptKV
from models.common.cache import KVCache, attend_cached, from_stored, held, to_stored
from models.common.placement import Placement
from models.common.rope import rotation_tables
from models.common.stack import ends_of, rotations, scan_layers

Observe = Callable[..., tuple[Array, Any]]


@functools.partial(jax.jit, static_argnames="config")
def run_forward(params, tokens, lengths, rope_length, *, config, attention_fn):
    """Computes the logits of every position; see `models.common.decoder.forward`."""
    ends, place = ends_of(params, config), Placement.of(attention_fn)
    batch, length = tokens.shape
    cos, sin = rotations(batch, jnp.arange(length, dtype=jnp.int32), rope_length, config)

    def attend(attention, q, k, v, layer, state):
        return attention(q, k, v, lengths=lengths, q_offset=None), state, None

    x, _, _ = scan_layers(
        params, ends.embed(tokens), cos, sin, attention_fn, attend, None, config=config, place=place
    )
    return ends.logits(x)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "chunk_size", "observe"))
def run_prefill(
    params, tokens, lengths, rope_length, *, config, attention_fn, capacity, chunk_size, observe,
    compression=None,
):  # fmt: skip
    """Computes logits, cache and what was observed; see `models.common.decoder.prefill`."""
    observe = _call_attention if observe is None else observe
    whole = chunk_size is None or chunk_size >= tokens.shape[1]
    if whole:
        read = functools.partial(_read_whole, compression=compression)
    else:
        read = functools.partial(_read_chunks, chunk_size=chunk_size)
    place = Placement.of(attention_fn)
    capacity = place.capacity(capacity, compression, tokens.shape[1])
    last, kept, observed = read(
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
    logits = place.logits(ends_of(params, config).logits(last))
    return logits, _cache(kept, lengths, rope_length, place), observed


@functools.partial(jax.jit, static_argnames=("config", "rows", "capacity", "observe"))
def run_hidden(
    params, tokens, lengths, rope_length, *, config, attention_fn, rows, capacity, observe,
    compression=None,
):  # fmt: skip
    """Computes the stream's last rows, cache and what was observed; see `capture.read_hidden`."""
    x, kept, observed = _stream_whole(
        params, tokens, lengths, rope_length, config=config, attention_fn=attention_fn,
        capacity=capacity, observe=observe, compression=compression,
    )  # fmt: skip
    take = lambda x, length: jax.lax.dynamic_slice_in_dim(x, jnp.maximum(length - rows, 0), rows)
    cache = _cache(kept, lengths, rope_length, Placement.of(attention_fn))
    return jax.vmap(take)(x, lengths), cache, observed


@functools.partial(jax.jit, static_argnames="config")
def run_logits(params, x, *, config):
    """Computes fp32 logits of rows of the stream behind the layers."""
    return ends_of(params, config).logits(x)


def _read_whole(params, tokens, lengths, rope_length, **how):
    """The whole prompt at once."""
    x, kept, observed = _stream_whole(params, tokens, lengths, rope_length, **how)
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    return Placement.of(how["attention_fn"]).row_at(x, lengths - 1), kept, observed


def _stream_whole(
    params, tokens, lengths, rope_length, *, config, attention_fn, capacity, observe, compression
):
    """The residual stream behind the layers; the cache leaves their scan as its stacked output.

    A layer's keys and values are compressed there, so those of all layers never exist together.
    """
    place = Placement.of(attention_fn)
    batch, length = tokens.shape
    stored = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    tokens, positions, lengths = place.arrange(tokens, lengths)
    cos, sin = rotations(batch, positions, rope_length, config)

    def attend(of_layer, q, k, v, layer, state):
        attention, compression = of_layer
        out, seen = observe(attention, q, k, v, lengths=lengths, q_offset=None)
        kept = place.keep(compression, q, k, v, lengths=lengths, stored=stored, capacity=capacity)
        return out, state, (kept, seen)

    x = ends_of(params, config).embed(place.rows(tokens))
    x, _, (kept, observed) = scan_layers(
        params, x, place.rows(cos), place.rows(sin), (attention_fn, compression), attend, None,
        config=config, place=place,
    )  # fmt: skip
    return x, kept, observed


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
    ends, place = ends_of(params, config), Placement.of(attention_fn)
    dtype = ends.embed.embedding.dtype
    # The last chunk is written whole, so the cache has room for its padding meanwhile.
    room = (config.num_layers, batch, max(capacity, padded), config.num_kv_heads, config.head_dim)

    def read_chunk(carry, chunk):
        keys, values, last = carry
        tokens, q_offset = chunk
        real = jnp.minimum(lengths, q_offset + chunk_size)
        positions = q_offset + jnp.arange(chunk_size, dtype=jnp.int32)
        cos, sin = rotations(batch, positions, rope_length, config)

        def attend(attention, q, k, v, layer, state):
            start = (layer, 0, q_offset, 0, 0)
            state = jax.tree.map(
                lambda store, new: jax.lax.dynamic_update_slice(store, new[None], start),
                state,
                (k, v),
            )
            state = held(state, place.of_cache(config.num_kv_heads))
            k, v = jax.tree.map(lambda store: store[layer], state)
            out, seen = observe(attention, q, k, v, lengths=real, q_offset=q_offset)
            return out, state, seen

        x, (keys, values), seen = scan_layers(
            params, ends.embed(tokens), cos, sin, attention_fn, attend, (keys, values),
            config=config, place=place,
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
    stored = jnp.broadcast_to(lengths[None, :], (config.num_layers, batch))
    return last, KeptKV(keys[:, :, :capacity], values[:, :, :capacity], stored), observed


@functools.partial(jax.jit, static_argnames=("config", "observe"))
def run_extend(params, tokens, lengths, cache, *, config, attention_fn, observe):
    """Reads more tokens of one row onto a cache; see `models.common.decoder.extend`."""
    observe = _call_attention if observe is None else observe
    x, cache, seen = _stream_onto(
        params, tokens, lengths, cache, config=config, attention_fn=attention_fn, observe=observe
    )
    logits = ends_of(params, config).logits(_row_at(x, lengths - 1))
    return Placement.of(attention_fn).logits(logits), cache, seen


@functools.partial(jax.jit, static_argnames="config")
def run_extend_hidden(params, tokens, cache, *, config, attention_fn):
    """Computes the stream's rows of further tokens, and cache; see `capture.extend_hidden`."""
    lengths = jnp.full(1, tokens.shape[1], jnp.int32)
    x, cache, _ = _stream_onto(
        params, tokens, lengths, cache, config=config, attention_fn=attention_fn,
        observe=_call_attention,
    )  # fmt: skip
    return x, cache


def _stream_onto(params, tokens, lengths, cache, *, config, attention_fn, observe):
    """The residual stream behind the layers of tokens that follow a cache; the cache with them."""
    ends = ends_of(params, config)
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    cos, sin = rotation_tables(config.rope, positions, cache.rope_length)

    def attend(of_layer, q, k, v, layer, state):
        attention, stored, scales = of_layer
        [q_offset] = stored  # of a compressed layer, rows of the cache are no positions
        start = (layer, 0, q_offset, 0, 0)
        state = jax.tree.map(
            lambda store, new: jax.lax.dynamic_update_slice(store, new[None], start),
            state,
            to_stored(k, v, scales, cache.keys.dtype),
        )
        state = held(state, cache.sharding)
        k, v = jax.tree.map(lambda store: store[layer], state)
        k, v = from_stored(k, v, scales, q.dtype)
        out, seen = observe(attention, q, k, v, lengths=stored + lengths, q_offset=q_offset)
        return out, state, seen

    x, (keys, values), seen = scan_layers(
        params, ends.embed(tokens), cos, sin, (attention_fn, cache.stored, cache.scales), attend,
        (cache.keys, cache.values), config=config, place=Placement.of(attention_fn),
    )  # fmt: skip
    counts = (cache.stored + lengths[None, :], cache.lengths + lengths, cache.rope_length)
    cache = KVCache(keys, values, *counts, scales=cache.scales, sharding=cache.sharding)
    return x, cache, seen


@functools.partial(jax.jit, static_argnames="config")
def run_decode_step(params, token, cache, *, config):
    """Reads one token of each row; see `models.common.decoder.decode_step`."""
    ends = ends_of(params, config)
    positions = cache.lengths[:, None]
    cos, sin = rotation_tables(config.rope, positions, cache.rope_length)
    rows = jnp.arange(token.shape[0])

    def attend(of_layer, q, k, v, layer, state):
        stored, scales = of_layer
        state = jax.tree.map(
            lambda store, new: store.at[layer, rows, stored].set(new[:, 0], mode="drop"),
            state,
            to_stored(k, v, scales, cache.keys.dtype),
        )
        state = held(state, cache.sharding)
        k, v = jax.tree.map(lambda store: store[layer], state)
        return attend_cached(q, k, v, stored + 1, scales), state, None

    x, (keys, values), _ = scan_layers(
        params, ends.embed(token[:, None]), cos, sin, (cache.stored, cache.scales), attend,
        (cache.keys, cache.values), config=config,
    )  # fmt: skip
    logits = ends.logits(x[:, 0])
    room = jnp.max(cache.stored, axis=0) < cache.capacity
    logits = jnp.where(room[:, None], logits, jnp.nan)
    counts = (cache.stored + 1, cache.lengths + 1, cache.rope_length)
    return logits, KVCache(keys, values, *counts, scales=cache.scales, sharding=cache.sharding)


@functools.partial(jax.jit, static_argnames="config")
def run_embedding(params, tokens, *, config):
    """Computes the residual stream before the first layer."""
    return ends_of(params, config).embed(tokens)


def _cache(kept, lengths, rope_length, place):
    """The cache of all layers after a prompt."""
    counts = (count.astype(jnp.int32) for count in (kept.stored, lengths, rope_length))
    sharding = place.of_cache(kept.keys.shape[3])
    keys, values = held((kept.keys, kept.values), sharding)
    return KVCache(keys, values, *counts, scales=kept.scales, sharding=sharding)


def _row_at(x: Float[Array, "batch s embed"], row: Int[Array, " batch"]) -> Array:
    return jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]


def _call_attention(attention, q, k, v, *, lengths, q_offset):
    return attention(q, k, v, lengths=lengths, q_offset=q_offset), None
