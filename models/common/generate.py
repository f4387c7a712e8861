"""Generation: prefill with any attention, then a compiled decode loop, greedy or sampled."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache import KVCompression
from minference_jax.types import AttentionFn
from models.common.cache import KVCache, room_for
from models.common.checks import (
    check_attention,
    check_compression,
    check_context,
    check_continuation,
    check_mesh,
    check_prompt,
    is_concrete,
)
from models.common.config import DecoderConfig
from models.common.passes import Observe, run_decode_step, run_prefill
from models.common.sampling import Sampling, choice_of, choose_tokens
from models.common.stack import Params


class GeneratedTokens(NamedTuple):
    """New tokens of each row.

    Attributes:
        tokens: `[batch, max_new_tokens]`; from a row's length on, zeros.
        lengths: `[batch]`, tokens before the stop token, which is not counted.
        observed: of the prompts, by the function given, as `models.common.decoder.prefill` returns
            it; None without one.
    """

    tokens: Int[Array, "batch max_new"]
    lengths: Int[Array, " batch"]
    observed: Any = None


def generate(
    params: Params,
    tokens: Int[Array, "batch s"],
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    max_new_tokens: int,
    sampling: Sampling,
    lengths: Int[Array, " batch"] | None = None,
    key: Array | None = None,
    stop_tokens: tuple[int, ...] = (),
    chunk_size: int | None = None,
    compression: KVCompression | None = None,
    observe: Observe | None = None,
) -> GeneratedTokens:
    """Continues right-padded prompts, each until a stop token or `max_new_tokens`.

    Rows do not influence each other: greedy results are those of each row alone. Dynamic rotary
    frequencies (LongRoPE, dynamic NTK) are those of the prompt's length plus `max_new_tokens`.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: prompts, right-padded.
        config: the model's hyper-parameters.
        attention_fn: attention of the prefill, as in `models.common.decoder.prefill`; new tokens
            attend densely to the cache.
        max_new_tokens: tokens to generate at most.
        sampling: how tokens are chosen.
        lengths: real tokens of each row, all of them if None.
        key: random key; needed unless greedy.
        stop_tokens: a row ends before any of these.
        chunk_size: prompt tokens computed at once, all if None.
        compression: what each layer keeps of the prompt, as in `prefill`; new tokens are all kept.
        observe: called instead of each layer's attention while the prompts are read, as in
            `models.common.decoder.prefill`.

    Raises:
        ValueError: as `prefill`; when prompt and new tokens exceed the model's context; when
            sampling has no key.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    check_prompt(tokens, lengths, config)
    check_attention(attention_fn, config.num_layers)
    whole = chunk_size is None or chunk_size >= tokens.shape[1]
    check_mesh(attention_fn, params, config, whole=whole, what="a prefill in chunks")
    check_compression(compression, config.num_layers, tokens.shape[1], chunk_size)
    check_continuation(compression, max_new_tokens)
    longest = tokens.shape[1]
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], longest, jnp.int32)
    elif is_concrete(lengths):
        longest = int(np.max(np.asarray(lengths)))
    check_context(longest + max_new_tokens, config)
    choice = choice_of(sampling, config.vocab_size)
    if not choice.greedy and key is None:
        raise ValueError("sampling with a temperature needs `key`, e.g. `jax.random.key(0)`")
    return _generate(
        params,
        tokens,
        lengths,
        key=jax.random.key(0) if key is None else key,
        attention_fn=attention_fn,
        compression=compression,
        choice=choice,
        config=config,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        chunk_size=chunk_size,
        observe=observe,
    )


_STATIC = ("config", "max_new_tokens", "stop_tokens", "chunk_size", "observe")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(
    params,
    tokens,
    lengths,
    *,
    key,
    attention_fn,
    compression,
    choice,
    config,
    max_new_tokens,
    stop_tokens,
    chunk_size,
    observe,
):
    logits, cache, observed = run_prefill(
        params,
        tokens,
        lengths,
        lengths + max_new_tokens,
        config=config,
        attention_fn=attention_fn,
        capacity=room_for(compression, tokens.shape[1], max_new_tokens, chunk_size),
        chunk_size=chunk_size,
        observe=observe,
        compression=compression,
    )
    found, _ = _decode(
        params, logits, cache, max_new_tokens, key, choice, config=config,
        max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
    )  # fmt: skip
    return found._replace(observed=observed)


def decode_greedily(
    params: Params,
    logits: Float[Array, "batch vocab"],
    cache: KVCache,
    limit: Int[Array, ""] | int,
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
) -> tuple[GeneratedTokens, KVCache]:
    """Goes on from a prefill as `generate` does, until every row has stopped.

    Args:
        params: the tree described in `models.common.decoder`.
        logits: of the next token of each row.
        cache: of the prompts, with room for all new tokens but the last.
        limit: tokens to generate at most, up to `max_new_tokens`; other limits run the same
            program.
        config: the model's hyper-parameters.
        max_new_tokens: room in what is returned.
        stop_tokens: a row ends before any of these.

    Returns:
        The new tokens, and the cache; rows that stopped early hold keys of no meaning at its end.
    """
    choice = choice_of(Sampling(), config.vocab_size)
    return _decode(
        params, logits, cache, limit, jax.random.key(0), choice, config=config,
        max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
    )  # fmt: skip


def _decode(params, logits, cache, limit, key, choice, *, config, max_new_tokens, stop_tokens):
    """The loop over new tokens; it ends with the last row's."""
    batch = logits.shape[0]
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def record(logits, step, finished, out, counts):
        step_key = jax.random.fold_in(key, step)
        token = choose_tokens(logits, choice, step_key)
        finished = finished | jnp.isin(token, stops)
        out = out.at[:, step].set(jnp.where(finished, 0, token))
        return token, finished, out, counts + ~finished

    def unfinished(state):
        step, _, finished, *_ = state
        return (step < limit) & ~jnp.all(finished)

    def next_token(state):
        step, token, finished, out, counts, cache = state
        logits, cache = run_decode_step(params, token, cache, config=config)
        return step + 1, *record(logits, step, finished, out, counts), cache

    first = record(
        logits,
        0,
        jnp.zeros(batch, bool),
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )
    *_, out, counts, cache = jax.lax.while_loop(unfinished, next_token, (1, *first, cache))
    return GeneratedTokens(out, counts), cache
