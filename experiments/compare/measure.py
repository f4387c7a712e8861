"""One prompt under one method: what is visited, and how far the model moves from dense."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.compare.methods import Method
from experiments.compare.prompts import Reading
from minference_jax.metrics import next_token_kl, top1_agreement
from minference_jax.search.cost import work_of
from models import Model
from models.common.cache import KVCache
from models.common.capture import read_hidden, row_logits
from models.common.config import DecoderConfig
from models.common.decoder import Params, decode_step, prefill

# Distributions over the vocabulary held at a time.
_POSITIONS = 64


class Positions(NamedTuple):
    """Comparison with dense at each of the last positions of a prompt.

    Attributes:
        kl: KL(dense || method) of the next token's distribution, in nats.
        agrees: whether the likeliest next token is the same.
        surprise: -log probability of the prompt's own next token under the method, in nats.
    """

    kl: Float[Array, " rows"]
    agrees: Bool[Array, " rows"]
    surprise: Float[Array, " rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, a prompt, and how it is measured.

    Attributes:
        model: the model.
        reading: the prompt.
        positions: last positions of the prompt that are compared.
        repeats: timed runs of the prefill; 0 for none.
    """

    model: Model
    reading: Reading
    positions: int
    repeats: int

    @property
    def tokens(self) -> Int[Array, "1 length"]:
        """The prompt as the model reads it."""
        return jnp.asarray([self.reading.tokens], jnp.int32)

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.reading.tokens) + len(self.reading.answer)

    def attention(self, method: Method) -> Any:
        """The method for the whole model; raises UserError if it is made for another."""
        return method.attention(self.model.config.num_layers, self.model.config.num_heads)


class Run(NamedTuple):
    """A prompt that was read: the last hidden rows, the cache, work of every layer and head."""

    hidden: Float[Array, "rows embed"]
    cache: KVCache
    work: dict[str, Any]


def read(subject: Subject, method: Method) -> Run:
    """Reads the prompt; the rows are those of the positions compared."""
    hidden, cache, work = read_hidden(
        subject.model.params, subject.tokens, config=subject.model.config,
        attention_fn=subject.attention(method), rows=subject.positions, capacity=subject.capacity,
        observe=_observe_work,
    )  # fmt: skip
    return Run(hidden[0], cache, work)


def figures(
    subject: Subject, method: Method, run: Run, dense_hidden: Float[Array, "rows embed"]
) -> dict[str, Any]:
    """Everything that is recorded of a run; uses up its cache.

    Args:
        subject: what was measured.
        method: the method.
        run: what `read` returned for it.
        dense_hidden: the rows that `read` returned for dense attention.
    """
    model, reading = subject.model, subject.reading
    targets = jnp.asarray([*reading.tokens[1:], 0][-subject.positions :], jnp.int32)
    scored = score_positions(
        model.params, run.hidden, dense_hidden, targets, config=model.config
    )  # fmt: skip
    kl, agrees, surprise = (np.asarray(x, np.float64) for x in scored)
    shares = {name: _share(work) for name, work in run.work.items()}
    result: dict[str, Any] = {
        "positions": subject.positions,
        "executed": float(shares["executed"].mean()),
        "visited": float(shares["visited"].mean()),
        "executed_by_head": np.round(shares["executed"], 5),
        "visited_by_head": np.round(shares["visited"], 5),
        "kl": float(kl.mean()),
        "kl_of_next_token": float(kl[-1]),
        "top1": float(agrees.mean()),
        # The last position's next token is not in the prompt.
        "perplexity": float(np.exp(surprise[:-1].mean())),
        "answer_probability": None,
        "answer_right": None,
        "compile_seconds": None,
        "prefill_seconds": [],
    }
    if reading.answer:
        answer = jnp.asarray(reading.answer, jnp.int32)
        surprises, likeliest, _ = force_answer(
            model.params, run.hidden[-1], answer, run.cache, config=model.config
        )
        result["answer_probability"] = float(np.exp(-np.asarray(surprises, np.float64).sum()))
        result["answer_right"] = bool(np.all(likeliest))
    if subject.repeats:
        result["compile_seconds"], result["prefill_seconds"] = _timed(subject, method)
    return result


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
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
        return Positions(next_token_kl(logits, dense), top1_agreement(logits, dense), -own)

    scored = jax.lax.map(one, jax.tree.map(split, (hidden, dense_hidden, targets)))
    return jax.tree.map(lambda x: x.reshape(-1)[:rows], scored)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def force_answer(
    params: Params,
    hidden: Float[Array, " embed"],
    answer: Int[Array, " answer"],
    cache: KVCache,
    *,
    config: DecoderConfig,
) -> tuple[Float[Array, " answer"], Bool[Array, " answer"], KVCache]:
    """Reads the right answer after a prompt, token by token, densely over the prompt's cache.

    Args:
        params: the tree described in `models.common.decoder`.
        hidden: the prompt's last row of the stream behind the layers.
        answer: tokens of the answer.
        cache: of the prompt, with room for the answer; it is used up.
        config: the model's hyper-parameters.

    Returns:
        -log probability of each token in nats; whether it is the likeliest (if all are, greedy
        decoding gives exactly this answer); and the cache.
    """

    def step(carry, token):
        logits, cache = carry
        surprise = -jax.nn.log_softmax(logits[0])[token]
        likeliest = jnp.argmax(logits[0]) == token
        return decode_step(params, token[None], cache, config=config), (surprise, likeliest)

    logits = row_logits(params, hidden[None], config=config)
    (_, cache), (surprises, likeliest) = jax.lax.scan(step, (logits, cache), answer)
    return surprises, likeliest, cache


def _observe_work(attention, q, k, v, *, lengths, q_offset):
    """Attends, and counts what each head visits and executes, as shares of dense attention."""
    out, index = attention.attend(q, k, v, lengths=lengths, q_offset=q_offset)
    count = lambda measure: work_of(index, q.shape[1], lengths, measure)
    return out, {"visited": count("density"), "executed": count("flops")}


def _share(work: Any) -> Float[np.ndarray, "layers heads"]:
    return np.asarray(work.sparse, np.float64) / np.asarray(work.dense, np.float64)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _prefill(params, tokens, attention, *, config, capacity):
    return prefill(params, tokens, config=config, attention_fn=attention, capacity=capacity)


def _timed(subject: Subject, method: Method) -> tuple[float, list[float]]:
    """Seconds to compile the prefill, and of each run of it: nothing is observed meanwhile."""
    model = subject.model
    arguments = (model.params, subject.tokens, subject.attention(method))
    start = time.perf_counter()
    static = {"config": model.config, "capacity": subject.capacity}
    compiled = _prefill.lower(*arguments, **static).compile()
    compiling, seconds = time.perf_counter() - start, []
    for _ in range(subject.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return compiling, seconds
