"""Checks of what callers pass, before anything runs; values where they are known (not traced)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minference_jax import (
    AdaptiveAttention,
    IndexedAttention,
    ShardedAttention,
    SparseAttention,
    StaticAttention,
)
from minference_jax.kv_cache import KVCompression
from models.common.cache import KVCache
from models.common.config import DecoderConfig, DynamicNTKScaling


def check_prompt(
    tokens: Int[Array, "batch s"], lengths: Int[Array, " batch"] | None, config: DecoderConfig
) -> None:
    """Raises ValueError when the prompts are empty, too long, or hold unknown tokens."""
    batch, length = tokens.shape
    if batch < 1 or length < 1:
        raise ValueError(
            f"the prompt is empty: `tokens` must hold at least one token, got shape {tokens.shape}"
        )
    longest = length
    if lengths is not None and is_concrete(lengths):
        found = np.asarray(lengths)
        if found.min() < 1 or found.max() > length:
            raise ValueError(
                f"`lengths` must lie in 1..{length}, the width of `tokens`; got "
                f"{found.min()}..{found.max()}"
            )
        longest = int(found.max())
    check_context(longest, config)
    if is_concrete(tokens):
        found = np.asarray(tokens)
        if found.min() < 0 or found.max() >= config.vocab_size:
            raise ValueError(
                f"`tokens` must lie in 0..{config.vocab_size - 1}, the model's vocabulary; got "
                f"{found.min()}..{found.max()}: does the tokenizer belong to this model?"
            )


def check_context(length: int, config: DecoderConfig) -> None:
    """Raises ValueError when a row of `length` tokens is longer than the model's context."""
    # Dynamic NTK stretches with the row: its `max_position` is only where stretching starts.
    if length > config.max_position and not isinstance(config.rope.scaling, DynamicNTKScaling):
        raise ValueError(
            f"{length} tokens do not fit the model's context of {config.max_position}; shorten the "
            "prompt, take a model made for longer ones, or extend this one: "
            '`load_model(…, rope_scaling={"rope_type": "yarn", "factor": 4.0})` with the scaling '
            "that its authors recommend"
        )


def check_split(config: DecoderConfig, devices: int) -> None:
    """Raises ValueError when so many devices cannot share a model's parameters."""
    shared = {
        "query heads": config.num_heads,
        "KV heads": config.num_kv_heads,
        "MLP columns": config.hidden_dim,
        "words of the vocabulary": config.vocab_size,
    }

    def uneven(devices: int) -> list[str]:
        # Fewer KV heads than devices are on all of them.
        few = devices % config.num_kv_heads == 0
        return [
            f"{size} {name}"
            for name, size in shared.items()
            if size % devices and not (name == "KV heads" and few)
        ]

    if found := uneven(devices):
        fits = [str(n) for n in range(1, config.num_heads + 1) if not uneven(n)]
        raise ValueError(
            f"{devices} devices cannot share the model evenly, it has {', '.join(found)}; split it "
            f"over {' or '.join(fits)} (other devices of the mesh can share the prompt)"
        )


def check_mesh(
    attention_fn: Any, params: Any, config: DecoderConfig, *, whole: bool, what: str
) -> None:
    """Raises ValueError when a pass cannot run on the mesh of its attention.

    Args:
        attention_fn: any attention; one for a single device passes.
        params: the parameters, which have to be on the mesh.
        config: the model's hyper-parameters.
        whole: the pass reads whole prompts, and so can split them.
        what: what it is called, for the error.
    """
    if not isinstance(attention_fn, ShardedAttention):
        return
    check_split(config, attention_fn.head_devices)
    attention_fn.check_prompt_split()
    if attention_fn.prompt_devices > 1 and not whole:
        raise ValueError(
            f"{what} cannot run with prompts split over {attention_fn.prompt_devices} devices: "
            "only `prefill` and `generate` without `chunk_size` can; take a mesh that splits heads "
            "alone, `attention_mesh(heads=…)`"
        )
    for leaf in jax.tree.leaves(params):
        if not isinstance(leaf, jax.Array) or not is_concrete(leaf):
            continue
        if leaf.sharding.device_set != set(attention_fn.mesh.devices.flat):
            raise ValueError(
                f"the parameters are on {len(leaf.sharding.device_set)} device(s), but the "
                f"attention's mesh has {attention_fn.mesh.size} (others, perhaps): "
                "`load_model(…, mesh=mesh)`, or `shard_params(params, mesh)`"
            )


def check_attention(attention_fn: Any, num_layers: int) -> None:
    """Raises when `attention_fn` is no pytree of arrays with a leading `[layers]` axis."""
    # The arrays of these are for heads, so without layers they have one axis or none.
    kinds = (AdaptiveAttention, IndexedAttention, SparseAttention, StaticAttention)
    inner = attention_fn.attention if isinstance(attention_fn, ShardedAttention) else attention_fn
    of_heads = isinstance(inner, kinds)
    for path, leaf in jax.tree_util.tree_leaves_with_path(attention_fn):
        name = f"`attention_fn`{jax.tree_util.keystr(path)}"
        if callable(leaf):
            raise TypeError(
                f"{name} must be an array, got {type(leaf).__name__}; an attention is a pytree: "
                "wrap a plain function in `jax.tree_util.Partial`"
            )
        shape = jnp.shape(leaf)
        if of_heads and len(shape) < 2:
            adaptive = isinstance(inner, AdaptiveAttention)
            advice = f": `attention.for_layers({num_layers})`" if adaptive else ""
            raise ValueError(
                f"{name} has shape {shape}, so this is the attention of one layer; pass one for "
                f"all {num_layers} layers of the model{advice}"
            )
        if not shape or shape[0] != num_layers:
            raise ValueError(
                f"{name} has shape {shape}, but the model has {num_layers} layers and needs a "
                "leading axis of that size: were these patterns made for another model?"
            )


def check_compression(
    compression: KVCompression | None, num_layers: int, length: int, chunk_size: int | None
) -> None:
    """Raises ValueError when a prompt of `length` tokens cannot be read with this compression."""
    if compression is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(compression):
        if jnp.shape(leaf)[:1] != (num_layers,):
            raise ValueError(
                f"`compression`{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the "
                f"model has {num_layers} layers and needs a leading axis of that size: for "
                f"PyramidKV, `PyramidKV.for_layers({num_layers})`"
            )
    if chunk_size is not None and chunk_size < length:
        raise ValueError(
            f"a prompt of {length} tokens in chunks of {chunk_size} cannot be compressed: every "
            "chunk attends to the whole cache of those before it; leave out `chunk_size` or "
            "`compression`"
        )


def check_continuation(compression: KVCompression | None, new_tokens: int) -> None:
    """Raises ValueError when there is to be room for tokens after a prompt that is not kept."""
    if compression is not None and compression.capacity == 0 and new_tokens > 0:
        raise ValueError(
            f"`compression` ({type(compression).__name__}) keeps nothing of the prompt, so that "
            f"nothing can follow it, but there is to be room for {new_tokens} tokens; it is for "
            "`prefill` with a `capacity` of 0"
        )


def check_cache_room(cache: KVCache, more: int = 1) -> None:
    """Raises ValueError when a row of the cache has no room for so many more tokens."""
    if not is_concrete(cache.stored):
        return
    stored = int(np.max(np.asarray(cache.stored)))
    if stored + more > cache.capacity:
        raise ValueError(
            f"the cache is full: its capacity is {cache.capacity} tokens, a row holds {stored}, "
            f"and {more} more are to be written; pass a larger `capacity` to `prefill`"
        )


def check_extension(
    tokens: Int[Array, "batch s"],
    lengths: Int[Array, " batch"] | None,
    cache: KVCache,
    config: DecoderConfig,
) -> None:
    """Raises ValueError when tokens, padding included, cannot be read onto a cache."""
    check_prompt(tokens, lengths, config)
    rows, width = cache.lengths.shape[0], tokens.shape[1]
    if rows != 1 or tokens.shape[0] != 1:
        raise ValueError(
            "tokens are read onto the cache of one row at a time, because rows end at different "
            f"places; got {tokens.shape[0]} rows of tokens and {rows} of the cache"
        )
    check_cache_room(cache, width)
    if is_concrete(cache.lengths):
        real = width if lengths is None or not is_concrete(lengths) else int(lengths[0])
        check_context(int(cache.lengths[0]) + real, config)


def is_concrete(array: Any) -> bool:
    """Returns whether the array's values are known now, that is, it is not traced."""
    return not isinstance(array, jax.core.Tracer)
