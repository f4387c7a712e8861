"""From hidden rows of a prompt: distance from dense attention, and how likely the answer is."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minference_jax.metrics import next_token_kl, top1_agreement
from models.common.cache import KVCache
from models.common.capture import row_logits
from models.common.config import DecoderConfig
from models.common.decoder import Params, decode_step

# Distributions over the vocabulary held at a time.
_POSITIONS = 64


class Positions(NamedTuple):
    """Comparison with dense at each of the last positions of a prompt.

    Attributes:
        kl: KL(dense || method) of the next token's distribution, in nats.
        agrees: whether the likeliest next token is the same.
        surprise: -log probability of the prompt's own next token under the method, in nats.
        dense_surprise: the same under dense attention.
    """

    kl: Float[Array, " rows"]
    agrees: Bool[Array, " rows"]
    surprise: Float[Array, " rows"]
    dense_surprise: Float[Array, " rows"]


@functools.partial(jax.jit, static_argnames="config")
def score_positions(
    params: Params,
    hidden: Float[Array, "rows embed"],
    dense_hidden: Float[Array, "rows embed"],
    targets: Int[Array, " rows"],
    *,
    config: DecoderConfig,
) -> Positions:
    """Compares hidden rows with those of dense attention, a few distributions at a time.

    Args:
        params: the tree described in `models.common.decoder`.
        hidden: rows of the stream behind the layers.
        dense_hidden: the same rows under dense attention.
        targets: the token that follows each row.
        config: the model's hyper-parameters.
    """
    rows = hidden.shape[0]
    chunks = -(-rows // _POSITIONS)

    def split(x):
        room = ((0, chunks * _POSITIONS - rows), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, room).reshape(chunks, _POSITIONS, *x.shape[1:])

    def one(chunk):
        hidden, dense_hidden, targets = chunk
        logits, dense = (row_logits(params, x, config=config) for x in (hidden, dense_hidden))
        own, dense_own = (
            jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], axis=1)[:, 0]
            for x in (logits, dense)
        )
        kl, agrees = next_token_kl(logits, dense), top1_agreement(logits, dense)
        return Positions(kl, agrees, -own, -dense_own)

    scored = jax.lax.map(one, jax.tree.map(split, (hidden, dense_hidden, targets)))
    return jax.tree.map(lambda x: x.reshape(-1)[:rows], scored)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def force_answer(
    params: Params,
    hidden: Float[Array, " embed"],
    answer: Int[Array, " room"],
    number: Int[Array, ""],
    cache: KVCache,
    *,
    config: DecoderConfig,
) -> tuple[Float[Array, " room"], Bool[Array, " room"], KVCache]:
    """Reads the right answer after a prompt, token by token, densely over the prompt's cache.

    Args:
        params: the tree described in `models.common.decoder`.
        hidden: the prompt's last row of the stream behind the layers.
        answer: tokens of the answer, padded.
        number: how many they are.
        cache: of the prompt, with room for the answer; it is used up.
        config: the model's hyper-parameters.

    Returns:
        -log probability of each token in nats; whether it is the likeliest (if all are, greedy
        decoding gives exactly this answer); both 0 for padding; and the cache.
    """

    def step(i, carry):
        logits, cache, surprises, likeliest = carry
        token = answer[i]
        surprises = surprises.at[i].set(-jax.nn.log_softmax(logits[0])[token])
        likeliest = likeliest.at[i].set(jnp.argmax(logits[0]) == token)
        logits, cache = decode_step(params, token[None], cache, config=config)
        return logits, cache, surprises, likeliest

    logits = row_logits(params, hidden[None], config=config)
    start = (logits, cache, jnp.zeros(answer.shape, jnp.float32), jnp.zeros(answer.shape, bool))
    _, cache, surprises, likeliest = jax.lax.fori_loop(0, number, step, start)
    return surprises, likeliest, cache
