"""Reading conversations piece by piece, each onto the cache of what came before, and answering."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import minference_jax as mj
from experiments.common.programs import Program, Programs
from experiments.evaluation.predict import Prediction
from experiments.evaluation.sample import Sample
from minference_jax.attention import VisitedPairs
from minference_jax.kv_cache import KVCompression
from models import Model
from models.common.cache import KVCache
from models.common.decoder import extend, prefill
from models.common.generate import decode_greedily

Tokens = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How conversations are read.

    Attributes:
        model: the model.
        attention: of all pieces of conversations of a length, with a leading [layers] axis on its
            arrays.
        compression: what is kept of the first piece, everything if None; of later ones all is.
        chat: put conversations into the chat template, if there is one.
        chunk_size: tokens of the first piece read at a time, all if None.
        programs: what is compiled, for this and other readers.
    """

    model: Model
    attention: Callable[[int], Any]
    compression: KVCompression | None
    chat: bool
    chunk_size: int | None
    programs: Programs = dataclasses.field(default_factory=Programs)


class Sizes(NamedTuple):
    """Tokens of a whole conversation, and of what is compiled: first piece, later one, cache."""

    length: int
    first: int
    later: int
    capacity: int


class State(NamedTuple):
    """What was read: logits after it, its cache, its tokens, pairs visited and causal.

    Seconds are those of the last piece.
    """

    logits: Float[Array, "1 vocab"]
    cache: KVCache
    tokens: int
    pairs: Float[np.ndarray, " 2"]
    seconds: float


def compile_for(conversation: Sequence[Sample], reader: Reader, sizes: Sizes) -> None:
    """Begins to compile what answering it runs."""
    program, _ = _reading((), reader, sizes)
    logits, cache, _ = program.outputs
    if sizes.later:
        _extending((), cache, reader, sizes)
    for turn in conversation[1:]:
        _decoding(turn, logits, cache, reader)


def read_first(tokens: Tokens, reader: Reader, sizes: Sizes) -> State:
    """Reads the first piece of a conversation."""
    (logits, cache, pairs), seconds = _timed(reader, *_reading(tokens, reader, sizes))
    return State(logits, cache, len(tokens), _sums(pairs), seconds)


def read_onto(state: State, tokens: Tokens, reader: Reader, sizes: Sizes) -> State:
    """Reads a later piece; what was read before stays as it is."""
    extending = _extending(tokens, state.cache, reader, sizes)
    (logits, cache, pairs), seconds = _timed(reader, *extending)
    tokens_read, pairs_read = state.tokens + len(tokens), state.pairs + _sums(pairs)
    return State(logits, cache, tokens_read, pairs_read, seconds)


def _reading(tokens: Tokens, reader: Reader, sizes: Sizes) -> tuple[Program, Any]:
    """What reads a first piece, and its arguments."""
    lengths = (jnp.asarray([length], jnp.int32) for length in (len(tokens), sizes.length))
    arguments = (
        reader.model.params, _padded(tokens, sizes.first), *lengths,
        reader.attention(sizes.length), reader.compression,
    )  # fmt: skip
    program = reader.programs.add(
        _read.lower, *arguments, config=reader.model.config, capacity=sizes.capacity,
        chunk_size=reader.chunk_size,
    )  # fmt: skip
    return program, arguments


def _extending(tokens: Tokens, cache: Any, reader: Reader, sizes: Sizes) -> tuple[Program, Any]:
    """What reads a later piece, and its arguments."""
    arguments = (
        reader.model.params, _padded(tokens, sizes.later), cache,
        jnp.asarray([len(tokens)], jnp.int32), reader.attention(sizes.length),
    )  # fmt: skip
    return reader.programs.add(_extend.lower, *arguments, config=reader.model.config), arguments


def _decoding(turn: Sample, logits: Any, cache: Any, reader: Reader) -> tuple[Program, Any]:
    """What decodes an answer, and its arguments."""
    model, room = reader.model, turn.max_new_tokens
    arguments = model.params, logits, cache, jnp.int32(room)
    program = reader.programs.add(
        _decode.lower, *arguments, config=model.config, max_new_tokens=room,
        stop_tokens=model.tokenizer.stop_tokens,
    )  # fmt: skip
    return program, arguments


def _timed(reader: Reader, program: Program, arguments: Any) -> tuple[Any, float]:
    run = reader.programs.ready(program)
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    return result, time.perf_counter() - start


@functools.partial(jax.jit, static_argnames=("config", "capacity", "chunk_size"))
def _read(
    params, tokens, lengths, rope_length, attention, compression, *, config, capacity, chunk_size
):
    return prefill(
        params, tokens, config=config, attention_fn=attention, lengths=lengths, capacity=capacity,
        rope_length=rope_length, chunk_size=chunk_size, observe=mj.observe_density,
        compression=compression,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _extend(params, tokens, cache, lengths, attention, *, config):
    return extend(
        params, tokens, cache, config=config, attention_fn=attention, lengths=lengths,
        observe=mj.observe_density,
    )  # fmt: skip


# The cache is not donated: further turns go on from it.
_decode = jax.jit(decode_greedily, static_argnames=("config", "max_new_tokens", "stop_tokens"))


def answer(turn: Sample, state: State, reader: Reader) -> Prediction:
    """Answers a turn that was read, greedily and densely."""
    model = reader.model
    (result, _), seconds = _timed(reader, *_decoding(turn, state.logits, state.cache, reader))
    new = np.asarray(result.tokens)[0, : int(result.lengths[0])].tolist()
    visited, causal = state.pairs
    return Prediction(
        name=turn.name,
        answer=model.tokenizer.decode(new),
        prompt_tokens=state.tokens,
        new_tokens=len(new),
        density=round(float(visited / causal), 6),
        batch=1,
        prefill_seconds=state.seconds,
        decode_seconds=seconds,
        cache_bytes=state.cache.keys.nbytes + state.cache.values.nbytes,
    )


def _padded(tokens: Tokens, width: int) -> Int[Array, "1 width"]:
    return jnp.asarray(np.pad(np.asarray(tokens, np.int32), (0, width - len(tokens)))[None])


def _sums(pairs: VisitedPairs) -> Float[np.ndarray, " 2"]:
    return np.array([np.sum(np.asarray(count, np.float64)) for count in pairs])
