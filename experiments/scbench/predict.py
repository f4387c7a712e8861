"""Answers to the turns of conversations, each read onto the cache of what came before."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from experiments.evaluation.folder import append_lines
from experiments.evaluation.predict import Prediction, read_predictions
from experiments.evaluation.sample import Sample
from experiments.scbench.pieces import Mode, Turn, cut
from experiments.scbench.reader import (
    Reader,
    Sizes,
    Tokens,
    answer,
    compile_for,
    read_first,
    read_onto,
)
from models.common.cache import kept_tokens

_STEP = 64  # widths of pieces are multiples of it, so that few programs are compiled


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
        alike = {(one[0].length, *(turn.max_new_tokens for turn in one)): one for one in missing}
        for one in alike.values():
            compile_for(one, reader, sizes[one[0].length])
        for one in alike.values():  # the first run also loads programs onto the device
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
) -> dict[int, Sizes]:
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
        sizes[length] = Sizes(length, first, later, kept + onto * later + new)
    return sizes


def _answers(
    conversation: Sequence[Sample],
    pieces: Sequence[Tokens],
    names: set[str],
    reader: Reader,
    mode: Mode,
    sizes: Sizes,
) -> Iterator[Prediction]:
    """Answers of the turns of these names, in their order."""
    _, *turns = conversation
    state = read_first(pieces[0], reader, sizes)
    start = state
    later = pieces[1:] if mode == "shared_context" else [None, *pieces[1:]]
    last = max(number for number, turn in enumerate(turns) if turn.name in names)
    for turn, piece in list(zip(turns, later, strict=True))[: last + 1]:
        if mode == "shared_context" and turn.name not in names:
            continue
        before = start if mode == "shared_context" else state
        state = before if piece is None else read_onto(before, piece, reader, sizes)
        if turn.name in names:
            yield answer(turn, state, reader)


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
