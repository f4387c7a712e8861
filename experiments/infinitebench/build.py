"""Samples of the synthetic tasks, made at any length from a seed."""

import functools
import itertools
import json
import random
import statistics
import uuid
from collections.abc import Callable

from experiments.common.errors import UserError
from experiments.common.prompts import fit_size
from experiments.evaluation.sample import Sample
from experiments.infinitebench.prompts import Question, ask
from experiments.infinitebench.tasks import (
    MAX_NEW_TOKENS,
    SYNTHETIC,
    Task,
    check_task,
    sample_name,
)

# Irrelevant text of the pass key task since Mohtashami and Jaggi (2023).
_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# What math_find asks for: the kind, and its place among the distinct numbers in order.
_RANKS = (
    ("largest", -1),
    ("second largest", -2),
    ("third largest", -3),
    ("smallest", 0),
    ("second smallest", 1),
    ("third smallest", 2),
    ("median", None),
)


def sample_maker(
    task: str, count_tokens: Callable[[str, str], int], length: int, number: int, seed: int
) -> Callable[[int], Sample]:
    """Returns what makes the samples of a synthetic task, the same ones in any order.

    Their prompts are the longest that, with lead and answer, take at most `length` tokens; less
    than a sentence, pair or number is missing (a pair of kv_retrieval has some 60 tokens). What is
    asked for lies at depths spread evenly over the text; math_find goes through its seven kinds.
    A length that is too short for a question is told when a sample is made.

    Args:
        task: name of the task, one of `SYNTHETIC`.
        count_tokens: how many tokens the model reads for a prompt and the answer's beginning, its
            chat template included.
        length: tokens that prompt, lead and answer take together.
        number: how many samples there are.
        seed: decides everything random.

    Raises:
        UserError: there is no such task, it is not synthetic, or no sample is asked for.
    """
    known = check_task(task)
    if known not in SYNTHETIC:
        raise UserError(
            f"{task} cannot be made: its samples are read from the data set; those that can be "
            f"made are: {', '.join(SYNTHETIC)}"
        )
    if number < 1:
        raise UserError(f"expected at least 1 sample of {task}, got {number}")
    max_new_tokens = MAX_NEW_TOKENS[known]
    room = length - max_new_tokens

    def question(place: int, size: int) -> Question:
        depth = place / (number - 1) if number > 1 else 0.5
        rng = random.Random(f"{task} {seed} {place}")
        return _question(known, rng, size, depth=depth, kind=place)

    def fit(place: int, first: int | None) -> int:
        def count(size: int) -> int:
            made = question(place, size)
            return count_tokens(made.prompt, made.lead)

        try:
            return fit_size(count, room, first=first)
        except UserError as error:
            raise UserError(
                f"{task} cannot be made of {length} tokens, {max_new_tokens} of which the answer "
                f"may take: {error}"
            ) from error

    # Sizes of all samples are near that of the first.
    near = functools.cache(lambda: fit(0, None))

    def make(place: int) -> Sample:
        made = question(place, fit(place, near()))
        return Sample(
            name=sample_name(task, length, place),
            task=task,
            length=length,
            prompt=made.prompt,
            lead=made.lead,
            answers=made.answers,
            max_new_tokens=max_new_tokens,
        )

    return make


def _question(task: Task, rng: random.Random, size: int, *, depth: float, kind: int) -> Question:
    """A question about sentences, pairs or numbers, `size` of them or a few more."""
    match task:
        case "passkey":
            key = "".join(rng.choices("0123456789", k=5))
            fact = f"The pass key is {key}. Remember it. {key} is the pass key."
            context, asked = _hidden(fact, size, depth), "What is the pass key?"
        case "number_string":
            key = "".join(2 * digit for digit in rng.choices("0123456789", k=5))
            fact = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
            context, asked = _hidden(fact, size, depth), "What is the sequence of digits?"
        case "kv_retrieval":
            pairs = [(_uuid(rng), _uuid(rng)) for _ in range(size)]
            name, key = pairs[round(depth * (size - 1))]
            context = f"JSON data:\n{json.dumps(dict(pairs))}"
            asked = f'Key: "{name}"\nThe value associated with the specified key is:'
        case _:
            name, rank = _RANKS[kind % len(_RANKS)]
            numbers = _numbers(rng, size, name)
            ordered = sorted(set(numbers))
            key = str(statistics.median(numbers) if rank is None else ordered[rank])
            context = str(numbers)
            asked = (
                "You should answer with only one number, no other words. "
                f"The {name} number of the list is:"
            )
    return ask(task, context=context, asked=asked, answers=(key,))


def _hidden(fact: str, size: int, depth: float) -> str:
    """A fact in a line of its own among so many sentences, five in a line."""
    sentences = itertools.islice(itertools.cycle(_NOISE), size)
    lines = [" ".join(line) for line in itertools.batched(sentences, len(_NOISE))]
    lines.insert(round(depth * len(lines)), fact)
    return "\n".join(lines)


def _numbers(rng: random.Random, size: int, kind: str) -> list[int]:
    """Two more numbers than `size`, three of them different, in a range that the seed narrows."""
    low, high = 0, 99
    if kind.endswith("largest") or (kind == "median" and rng.random() < 0.5):
        high = rng.randint(79, 99)
    else:
        low = rng.randint(0, 19)
    numbers = rng.sample(range(low, high + 1), 3) + rng.choices(range(low, high + 1), k=size - 1)
    rng.shuffle(numbers)
    return numbers


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
