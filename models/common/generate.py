"""Generation: prefill with any attention, then a compiled decode loop, greedy or sampled."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
from models.common.stack import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: samples among the k most likely tokens only.
        top_p: samples among the smallest set of most likely tokens whose probability reaches p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")


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


class _Filter(NamedTuple):
    """A sampling's numbers as arrays, so that other values run the same program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


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
    greedy = sampling.temperature == 0
    if not greedy and key is None:
        raise ValueError("sampling with a temperature needs `key`, e.g. `jax.random.key(0)`")
    return _generate(
        params,
        tokens,
        lengths,
        key=jax.random.key(0) if key is None else key,
        attention_fn=attention_fn,
        compression=compression,
        numbers=_filter(sampling, config.vocab_size),
        greedy=greedy,
        filtered=sampling.top_k is not None or sampling.top_p is not None,
        config=config,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        chunk_size=chunk_size,
        observe=observe,
    )


def choose_tokens(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: Array
) -> Int[Array, " batch"]:
    """Chooses one token of each row; `key` is not read when greedy."""
    filtered = sampling.top_k is not None or sampling.top_p is not None
    numbers = _filter(sampling, logits.shape[-1])
    return _choose(logits, key, numbers, greedy=sampling.temperature == 0, filtered=filtered)


_STATIC = ("config", "max_new_tokens", "stop_tokens", "chunk_size", "observe", "greedy", "filtered")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(
    params,
    tokens,
    lengths,
    *,
    key,
    attention_fn,
    compression,
    numbers,
    greedy,
    filtered,
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
        params, logits, cache, max_new_tokens, key, numbers, greedy=greedy, filtered=filtered,
        config=config, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
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
    numbers = _filter(Sampling(), config.vocab_size)
    return _decode(
        params, logits, cache, limit, jax.random.key(0), numbers, greedy=True, filtered=False,
        config=config, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
    )  # fmt: skip


def _decode(
    params,
    logits,
    cache,
    limit,
    key,
    numbers,
    *,
    greedy,
    filtered,
    config,
    max_new_tokens,
    stop_tokens,
):
    """The loop over new tokens; it ends with the last row's."""
    batch = logits.shape[0]
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def record(logits, step, finished, out, counts):
        step_key = jax.random.fold_in(key, step)
        token = _choose(logits, step_key, numbers, greedy=greedy, filtered=filtered)
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


def _choose(
    logits: Float[Array, "batch vocab"],
    key: Array,
    numbers: _Filter,
    *,
    greedy: bool,
    filtered: bool,
) -> Int[Array, " batch"]:
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers.temperature
    if not filtered:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    place = jax.random.categorical(key, jnp.where(_kept(ranked, numbers), ranked, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _kept(ranked: Float[Array, "batch vocab"], numbers: _Filter) -> Bool[Array, "batch vocab"]:
    """Which of the descending logits may be sampled: top-k first, top-p of what is left."""
    within_k = (jnp.arange(ranked.shape[-1]) < numbers.top_k)[None, :]
    probability = jax.nn.softmax(jnp.where(within_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    return within_k & (before < numbers.top_p)


def _filter(sampling: Sampling, vocab_size: int) -> _Filter:
    return _Filter(
        temperature=jnp.asarray(sampling.temperature, jnp.float32),
        top_k=jnp.asarray(sampling.top_k or vocab_size, jnp.int32),
        # Rounding may bring the cumulated probability to 1 before the last token.
        top_p=jnp.asarray(2.0 if sampling.top_p in (None, 1.0) else sampling.top_p, jnp.float32),
    )
