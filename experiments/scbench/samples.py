"""Conversations about one context: keys and their values, or numbers hidden in a text.

In the manner of SCBench (Li et al. 2024, arXiv 2412.10319): `retr_kv` is its Retr.KV, `needles` is
RULER's needles in a text, one asked for in each turn. Wording and sizes are our own.

A conversation is a sample for its context, which asks nothing, and one for each turn, so that a
turn's task is a task of its own and means are those of the turns.
"""

import dataclasses
import functools
import itertools
import json
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Literal

from experiments.common.errors import UserError
from experiments.common.prompts import fit_size
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft
from experiments.ruler.niah import hide_in_text
from experiments.ruler.words import ADJECTIVES, NOUNS
from experiments.scbench.pieces import Turn, cut
from models import Model

TaskName = Literal["retr_kv", "needles"]

# SCBench lets answers of Retr.KV take 150 tokens.
MAX_NEW_TOKENS: dict[TaskName, int] = {"retr_kv": 150, "needles": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Questions about one context."""

    context: str
    turns: tuple[Turn, ...]


def turn_task(task: str, turn: int) -> str:
    """Returns the name under which a turn, counted from 1, is scored."""
    return f"{task}, turn {turn}"


def drafts(
    model: Model,
    *,
    tasks: Sequence[TaskName],
    lengths: Sequence[int],
    samples: int,
    turns: int,
    text: str,
    seed: int,
    chat: bool,
) -> list[Draft]:
    """Returns conversations before they are made: of each, its context, then its turns.

    Args:
        model: the model; a whole conversation of several turns takes at most `length` of its
            tokens, the last answer with all that it may take.
        tasks: names of the tasks.
        lengths: tokens of a conversation.
        samples: conversations of each task and length.
        turns: of each conversation.
        text: what `needles` are hidden in.
        seed: decides everything random.
        chat: conversations will be put into the chat template.
    """
    made = functools.partial(_conversation, model, turns=turns, text=text, seed=seed, chat=chat)
    made = functools.lru_cache(maxsize=16)(made)  # the drafts of a conversation come together
    found = []
    for length, task, index in itertools.product(lengths, tasks, range(samples)):
        found += _drafts(functools.partial(made, task, length, index), task, length, index, turns)
    return found


def _drafts(
    made: Callable[[], Conversation], task: TaskName, length: int, index: int, turns: int
) -> list[Draft]:
    def make(turn: int) -> Sample:
        asked = made().turns[turn - 1] if turn else Turn(made().context, "", "")
        return Sample(
            name=names[turn],
            task=scored[turn],
            length=length,
            prompt=asked.question,
            lead=asked.lead,
            answers=(asked.answer,) if turn else (),
            max_new_tokens=MAX_NEW_TOKENS[task] if turn else 0,
        )

    scored = [f"{task}, context", *(turn_task(task, turn) for turn in range(1, turns + 1))]
    names = [f"{one}, {length} tokens, {index}" for one in scored]
    return [
        Draft(names[turn], scored[turn], length, functools.partial(make, turn))
        for turn in range(turns + 1)
    ]


def _conversation(
    model: Model,
    task: TaskName,
    length: int,
    index: int,
    *,
    turns: int,
    text: str,
    seed: int,
    chat: bool,
) -> Conversation:
    """The largest conversation of at most `length` tokens."""

    def build(size: int) -> Conversation:
        rng = random.Random(f"{seed} {task} {length} {index}")
        if task == "retr_kv":
            return _key_value(size + turns - 1, turns, rng)
        return _needles(text, size, turns, rng)

    def count(size: int) -> int:
        found = build(size)
        pieces = cut(model, found.context, found.turns, mode="multi_turn", chat=chat)
        return sum(map(len, pieces)) + MAX_NEW_TOKENS[task]

    try:
        return build(fit_size(count, length))
    except UserError as error:
        raise UserError(f"{task} of {length} tokens cannot be made: {error}") from error


def _key_value(pairs: int, turns: int, rng: random.Random) -> Conversation:
    draw = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    table = {draw(): draw() for _ in range(pairs)}
    return Conversation(
        context="Find the values of the keys asked for in the JSON object below.\n\n"
        f"{json.dumps(table)}\n\n",
        turns=tuple(
            Turn(
                question=f'Which value is associated with the key "{key}"?',
                lead=" The value associated with this key is:",
                answer=table[key],
            )
            for key in rng.sample(list(table), turns)
        ),
    )


def _needles(text: str, words: int, turns: int, rng: random.Random) -> Conversation:
    hidden: dict[str, str] = {}
    while len(hidden) < turns:
        hidden[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"] = str(rng.randrange(10**6, 10**7))
    facts = [f"One of the special magic numbers for {key} is: {hidden[key]}." for key in hidden]
    rng.shuffle(facts)
    return Conversation(
        context="Some special magic numbers are hidden within the following text. Make sure to "
        "memorize them. I will quiz you about the numbers afterwards.\n"
        f"{hide_in_text(facts, text, words, rng)}\n\n",
        turns=tuple(
            Turn(
                question=f"What is the special magic number for {key} mentioned in the provided "
                "text?",
                lead=f" The special magic number for {key} mentioned in the provided text is",
                answer=number,
            )
            for key, number in hidden.items()
        ),
    )
