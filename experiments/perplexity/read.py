"""Texts read at once, or as a prompt and a continuation that is read onto what is kept of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import minference_jax as mj
from minference_jax.attention import VisitedPairs
from minference_jax.kv_cache import KVCompression
from models.common.cache import KVCache, kept_tokens
from models.common.capture import extend_hidden, read_hidden
from models.common.config import DecoderConfig
from models.common.decoder import Params
from models.common.memory import num_bytes


class Reader(NamedTuple):
    """How a method reads: a pytree.

    Attributes:
        attention: of a text, or of its prompt; a leading [layers] axis on its arrays.
        compression: what is kept of the prompt for the continuation, everything if None.
    """

    attention: Any
    compression: KVCompression | None = None


DENSE = Reader(mj.DenseAttention())


@functools.partial(jax.jit, static_argnames=("config", "continuation"))
def read(
    params: Params,
    tokens: Int[Array, " s"],
    reader: Reader,
    *,
    config: DecoderConfig,
    continuation: int | None,
) -> tuple[Float[Array, "scored embed"], VisitedPairs]:
    """Reads a text, and keeps the rows of the stream behind the layers that predict what is scored.

    A text read at once: all tokens but the first. With a continuation, that: its first token is
    predicted by the prompt's last row, which does not depend on what is kept, all others by rows
    that were read onto the cache, all at once and densely. They attend to what is kept of the
    prompt and to each other. As in decoding, the continuation's own keys and values are all kept,
    and a cache in 8 bits stores them with the prompt's scales before they are read; attention gets
    them multiplied out in the model's type, where decoding multiplies scales into the queries.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: the text.
        reader: how it is read.
        config: the model's hyper-parameters.
        continuation: last tokens of the text that are its continuation, 1 to s - 1, or None.

    Returns:
        The rows, and the pairs that the reader's attention visited.
    """
    hidden, cache, pairs = _read_prompt(
        params, tokens, reader, config=config, continuation=continuation
    )
    if continuation is None:
        return hidden[:-1], pairs
    rest, _ = extend_hidden(
        params, tokens[None, -continuation:], cache, config=config, attention_fn=DENSE.attention
    )
    return jnp.concatenate([hidden, rest[0, :-1]]), pairs


def cache_bytes(
    params: Params,
    tokens: Int[Array, " s"],
    reader: Reader,
    *,
    config: DecoderConfig,
    continuation: int | None,
) -> int | None:
    """Bytes of the prompt's cache, without room for a continuation; computes nothing, see `read`.

    None if texts are read at once.
    """
    if continuation is None:
        return None
    sizes = functools.partial(_read_prompt, config=config, continuation=continuation)
    _, cache, _ = jax.eval_shape(sizes, params, tokens, reader)
    one_token = num_bytes((cache.keys, cache.values)) // cache.capacity
    return one_token * (cache.capacity - continuation) + num_bytes(cache.scales)


def _read_prompt(
    params, tokens, reader, *, config, continuation
) -> tuple[Float[Array, "rows embed"], KVCache, VisitedPairs]:
    """All rows of a text, or the last one of a prompt with a cache for its continuation."""
    room = continuation or 0
    prompt = tokens[: tokens.shape[0] - room]
    length = prompt.shape[0]
    hidden, cache, pairs = read_hidden(
        params, prompt[None], config=config, attention_fn=reader.attention,
        lengths=jnp.full(1, length, jnp.int32),
        rope_length=jnp.full(1, tokens.shape[0], jnp.int32),  # as if the text were read at once
        rows=1 if room else length,
        capacity=kept_tokens(reader.compression, length) + room,
        observe=mj.observe_density, compression=reader.compression,
    )  # fmt: skip
    return hidden[0], cache, pairs
