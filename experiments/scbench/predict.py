"""Answers to the turns of conversations, each read onto the cache of what came before."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import minference_jax as mj
from experiments.evaluation.folder import append_lines
from experiments.evaluation.predict import Prediction, read_predictions
from experiments.evaluation.sample import Sample
from experiments.scbench.pieces import Mode, Turn, cut
from minference_jax.attention import VisitedPairs
from minference_jax.kv_cache import KVCompression
from models import Model
from models.common.cache import KVCache, kept_tokens
from models.common.decoder import extend, prefill
from models.common.generate import decode_greedily

# The cache is not donated: further turns go on from it.
_decode = jax.jit(decode_greedily, static_argnames=("config", "max_new_tokens", "stop_tokens"))

_STEP = 64  # widths of pieces are multiples of it, so that few programs are compiled

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
    """

    model: Model
    attention: Callable[[int], Any]
    compression: KVCompression | None
    chat: bool
    chunk_size: int | None


class _Sizes(NamedTuple):
    """Tokens of a whole conversation, and of what is compiled: first piece, later one, cache."""

    length: int
    first: int
    later: int
    capacity: int


class _State(NamedTuple):
    """What was read: logits after it, its cache, its tokens, pairs visited and causal.

    Seconds are those of the last piece.
    """

    logits: Float[Array, "1 vocab"]
    cache: KVCache
    tokens: int
    pairs: Float[np.ndarray, " 2"]
    seconds: float


def predict(
    folder: Path,
    conversations: Sequence[Sequence[Sample]],
    reader: Reader,
    *,
    mode: Mode,
    name: str,
) -> list[Prediction]:
    """Answers the turns that `predictions.jsonl` does not hold, and returns all answers.

    A conversation is read again up to its missing turns. Right answers stand in its history, so
    that what is asked for does not depend on answers before. Decoding is greedy and dense.

    Args:
        folder: of the mode and method; created if missing.
        conversations: the sample of the context and those of the turns, of each.
        reader: how they are read.
        mode: how questions are asked.
        name: of the method, while progress is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.jsonl"
    known = read_predictions(folder)
    missing = [one for one in conversations if any(turn.name not in known for turn in one[1:])]
    if missing:
        pieces = _tokenised(conversations, reader, mode)
        sizes = _sizes(conversations, pieces, reader, mode)
        for one in {one[0].length: one for one in missing}.values():  # compiles
            names = {turn.name for turn in one[1:]}
            list(_answers(one, pieces[one[0].name], names, reader, mode, sizes[one[0].length]))
        for one in tqdm(missing, f"{name}, {mode}", unit="conversation", disable=None):
            names = {turn.name for turn in one[1:]} - known.keys()
            [context, *_] = one
            for made in _answers(
                one, pieces[context.name], names, reader, mode, sizes[context.length]
            ):
                known[made.name] = made
                append_lines(path, [dataclasses.asdict(made)])
    return [known[turn.name] for _, *turns in conversations for turn in turns]


def _tokenised(
    conversations: Sequence[Sequence[Sample]], reader: Reader, mode: Mode
) -> dict[str, list[list[int]]]:
    """The pieces of each conversation by the name of its context."""

    def tokens_of(one: Sequence[Sample]) -> list[list[int]]:
        context, *asked = one
        turns = [Turn(turn.prompt, turn.lead, turn.answers[0]) for turn in asked]
        return cut(reader.model, context.prompt, turns, mode=mode, chat=reader.chat)

    with ThreadPoolExecutor() as pool:  # tokenizers leave Python while they work
        made = tqdm(
            pool.map(tokens_of, conversations), "tokenising", len(conversations), disable=None
        )
        return dict(zip((one[0].name for one in conversations), made, strict=True))


def _sizes(
    conversations: Sequence[Sequence[Sample]],
    pieces: dict[str, list[list[int]]],
    reader: Reader,
    mode: Mode,
) -> dict[int, _Sizes]:
    """The sizes of each length: all its conversations share compiled programs."""
    sizes = {}
    for length in {one[0].length for one in conversations}:
        alike = [one for one in conversations if one[0].length == length]
        cuts = [pieces[one[0].name] for one in alike]
        first = _rounded(max(len(cut[0]) for cut in cuts))
        later = _rounded(max((len(piece) for cut in cuts for piece in cut[1:]), default=0))
        onto = max(len(cut) - 1 for cut in cuts) if mode == "multi_turn" else 1
        new = max(turn.max_new_tokens for one in alike for turn in one)
        kept = kept_tokens(reader.compression, first)
        sizes[length] = _Sizes(length, first, later, kept + onto * later + new)
    return sizes


def _answers(
    conversation: Sequence[Sample],
    pieces: Sequence[Tokens],
    names: set[str],
    reader: Reader,
    mode: Mode,
    sizes: _Sizes,
) -> Iterator[Prediction]:
    """Answers of the turns of these names, in their order."""
    _, *turns = conversation
    state = _read_first(pieces[0], reader, sizes)
    start = state
    later = pieces[1:] if mode == "shared_context" else [None, *pieces[1:]]
    last = max(number for number, turn in enumerate(turns) if turn.name in names)
    for turn, piece in list(zip(turns, later, strict=True))[: last + 1]:
        if mode == "shared_context" and turn.name not in names:
            continue
        before = start if mode == "shared_context" else state
        state = before if piece is None else _read_onto(before, piece, reader, sizes)
        if turn.name in names:
            yield _answer(turn, state, reader)


def _read_first(tokens: Tokens, reader: Reader, sizes: _Sizes) -> _State:
    start = time.perf_counter()
    result: Any = prefill(
        reader.model.params,
        _padded(tokens, sizes.first),
        config=reader.model.config,
        attention_fn=reader.attention(sizes.length),
        lengths=jnp.asarray([len(tokens)], jnp.int32),
        capacity=sizes.capacity,
        rope_length=jnp.asarray([sizes.length], jnp.int32),
        chunk_size=reader.chunk_size,
        observe=mj.observe_density,
        compression=reader.compression,
    )
    logits, cache, pairs = jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    return _State(logits, cache, len(tokens), _sums(pairs), seconds)


def _read_onto(state: _State, tokens: Tokens, reader: Reader, sizes: _Sizes) -> _State:
    start = time.perf_counter()
    result: Any = extend(
        reader.model.params,
        _padded(tokens, sizes.later),
        state.cache,
        config=reader.model.config,
        attention_fn=reader.attention(sizes.length),
        lengths=jnp.asarray([len(tokens)], jnp.int32),
        observe=mj.observe_density,
    )
    logits, cache, pairs = jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    tokens_read, pairs_read = state.tokens + len(tokens), state.pairs + _sums(pairs)
    return _State(logits, cache, tokens_read, pairs_read, seconds)


def _answer(turn: Sample, state: _State, reader: Reader) -> Prediction:
    model = reader.model
    start = time.perf_counter()
    result, _ = _decode(
        model.params,
        state.logits,
        state.cache,
        turn.max_new_tokens,
        config=model.config,
        max_new_tokens=turn.max_new_tokens,
        stop_tokens=model.tokenizer.stop_tokens,
    )
    result = jax.block_until_ready(result)
    seconds = time.perf_counter() - start
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


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
