"""Answers to batches of prompts, with times that leave compilation out."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import minference_jax as mj
from experiments.common.programs import Program, Programs
from minference_jax.attention import VisitedPairs
from minference_jax.kv_cache import KVCompression
from models import Model
from models.common.cache import KVCache, room_for
from models.common.config import DecoderConfig
from models.common.decoder import Params, prefill
from models.common.generate import GeneratedTokens, decode_greedily
from models.common.passes import Observe

# Bytes of an index that is kept until the time is taken; a larger one is counted meanwhile.
_INDEX_BYTES = 4 << 30


class Batch(NamedTuple):
    """Prompts that are answered together.

    Attributes:
        tokens: right-padded.
        lengths: real tokens of each prompt.
        limit: tokens that an answer may take.
        room: the most tokens of any answer; batches with other limits share programs.
        length: tokens that the prompts were made for.
    """

    tokens: Int[np.ndarray, "batch s"]
    lengths: Int[np.ndarray, " batch"]
    limit: int
    room: int
    length: int


class Answers(NamedTuple):
    """What a model answered to a batch, and what that took.

    Attributes:
        tokens: of each answer, without the one that ends it.
        density: share of the causal pairs visited, of each prompt, over all layers and heads.
        prefill_seconds: until the logits of all first tokens were there, compilation apart. Visited
            pairs are counted afterwards, but for prompts in chunks and indices of more than 4 GiB.
        decode_seconds: from then on until every answer had ended, compilation apart.
        cache_bytes: memory of the keys and values, room for the answers included.
    """

    tokens: list[list[int]]
    density: list[float]
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


class Answerer:
    """Answers batches greedily; a program is compiled once, and loaded before time is taken.

    Methods share programs if their attentions, compressions and shapes do.
    """

    def __init__(self, model: Model, *, chunk_size: int | None) -> None:
        """Takes the model, and the prompt tokens that are read at a time, all if None."""
        self.model, self._chunk_size = model, chunk_size
        self.programs = Programs()
        self._loaded: set[int] = set()

    def __call__(
        self, batch: Batch, attention: Any, compression: KVCompression | None = None
    ) -> Answers:
        """Answers a batch; attention and compression are those of all layers of the model."""
        known = len(self._loaded)
        answers = self._answer(batch, attention, compression)
        if jax.default_backend() == "cpu" or len(self._loaded) == known:
            return answers
        return self._answer(batch, attention, compression)  # the first run also loaded programs

    def compile(
        self, batch: Batch, attention: Any, compression: KVCompression | None = None
    ) -> None:
        """Begins to compile in threads what batches of this one's shapes will run."""
        reading, lengths, limit = self._reading(batch, attention, compression)
        logits, cache, seen = reading.outputs
        if not isinstance(seen, VisitedPairs):
            self._counting(seen, lengths, batch)
        self._decoding(logits, cache, limit, batch)

    def _answer(self, batch: Batch, attention: Any, compression: Any) -> Answers:
        params = self.model.params
        reading, lengths, limit = self._reading(batch, attention, compression)
        read = self._run(reading)
        tokens = jnp.asarray(batch.tokens, jnp.int32)
        start = time.perf_counter()
        logits, cache, seen = jax.block_until_ready(
            read(params, tokens, lengths, limit, attention, compression)
        )
        prefill_seconds = time.perf_counter() - start
        pairs = seen
        if not isinstance(seen, VisitedPairs):
            pairs = self._run(self._counting(seen, lengths, batch))(seen, lengths)
        density = _density(pairs)
        del seen, pairs  # an index takes memory
        cache_bytes = cache.keys.nbytes + cache.values.nbytes
        decode = self._run(self._decoding(logits, cache, limit, batch))
        start = time.perf_counter()
        found, _ = jax.block_until_ready(decode(params, logits, cache, limit))
        decode_seconds = time.perf_counter() - start
        new, counts = np.asarray(found.tokens), np.asarray(found.lengths)
        return Answers(
            tokens=[row[:count].tolist() for row, count in zip(new, counts, strict=True)],
            density=density,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            cache_bytes=cache_bytes,
        )

    def _reading(
        self, batch: Batch, attention: Any, compression: Any
    ) -> tuple[Program, Array, Array]:
        """What reads a batch, the prompts' lengths, and the tokens of an answer."""
        width, chunk_size = batch.tokens.shape[1], self._chunk_size
        if chunk_size is not None and chunk_size >= width:
            chunk_size = None
        lengths, limit = jnp.asarray(batch.lengths, jnp.int32), jnp.int32(batch.limit)
        tokens = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.int32)
        program = self.programs.add(
            _lower_read, self.model.params, tokens, lengths, limit, attention, compression,
            config=self.model.config, room=batch.room, chunk_size=chunk_size,
        )  # fmt: skip
        return program, lengths, limit

    def _counting(self, seen: Any, lengths: Array, batch: Batch) -> Program:
        return self.programs.add(_count.lower, seen, lengths, length=batch.tokens.shape[1])

    def _decoding(self, logits: Any, cache: Any, limit: Array, batch: Batch) -> Program:
        model = self.model
        return self.programs.add(
            _decode.lower, model.params, logits, cache, limit, config=model.config, room=batch.room,
            stop_tokens=model.tokenizer.stop_tokens,
        )  # fmt: skip

    def _run(self, program: Program) -> Any:
        self._loaded.add(id(program))
        return self.programs.ready(program)


def _lower_read(*arguments: Any, chunk_size: int | None, **static: Any) -> jax.stages.Lowered:
    """What reads prompts, and hands out the index of every layer if that is small enough."""
    if chunk_size is None:
        lowered = _read.lower(*arguments, chunk_size=None, observe=_keep_index, **static)
        _, _, index = lowered.out_info
        if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(index)) <= _INDEX_BYTES:
            return lowered
    return _read.lower(*arguments, chunk_size=chunk_size, observe=mj.observe_density, **static)


def _keep_index(attention, q, k, v, *, lengths, q_offset):
    return attention.attend(q, k, v, lengths=lengths, q_offset=q_offset)


@functools.partial(jax.jit, static_argnames=("config", "room", "chunk_size", "observe"))
def _read(
    params: Params,
    tokens: Int[Array, "batch s"],
    lengths: Int[Array, " batch"],
    limit: Int[Array, ""],
    attention: Any,
    compression: KVCompression | None,
    *,
    config: DecoderConfig,
    room: int,
    chunk_size: int | None,
    observe: Observe,
) -> Any:
    """Logits of the first tokens `[batch, vocab]`, the cache, and what was observed."""
    return prefill(
        params, tokens, config=config, attention_fn=attention, lengths=lengths,
        capacity=room_for(compression, tokens.shape[1], room, chunk_size),
        rope_length=lengths + limit, chunk_size=chunk_size, observe=observe,
        compression=compression,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="length")
def _count(index: Any, lengths: Int[Array, " batch"], *, length: int) -> VisitedPairs:
    """Pairs that each layer visited, a layer at a time."""
    count = lambda index: VisitedPairs(*index.visited_pairs(length, length, lengths=lengths))
    return jax.lax.map(count, index)


@functools.partial(
    jax.jit, static_argnames=("config", "room", "stop_tokens"), donate_argnames="cache"
)
def _decode(
    params: Params,
    logits: Float[Array, "batch vocab"],
    cache: KVCache,
    limit: Int[Array, ""],
    *,
    config: DecoderConfig,
    room: int,
    stop_tokens: tuple[int, ...],
) -> tuple[GeneratedTokens, KVCache]:
    """The new tokens; the cache is updated in place."""
    return decode_greedily(
        params, logits, cache, limit, config=config, max_new_tokens=room, stop_tokens=stop_tokens
    )


def _density(pairs: VisitedPairs) -> list[float]:
    """Shares of rows; counts are [layers, batch, heads], or [layers, chunks, batch, heads]."""
    rows = lambda x: np.moveaxis(np.asarray(x, np.float64), -2, 0)
    visited, causal = (x.reshape(x.shape[0], -1).sum(axis=1) for x in map(rows, pairs))
    return np.round(visited / causal, 6).tolist()
