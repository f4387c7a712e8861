"""Samples of the needle-in-a-haystack grid: a city's number in a passage of a book."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from experiments.common.errors import reported_as_user_error
from experiments.common.prompts import Prompt, book_prompt, fit_prompt
from experiments.common.session import tokens_of
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft
from models import Model

TASK = "needle"
MAX_NEW_TOKENS = 32

_CITIES = (
    "Accra", "Adelaide", "Algiers", "Amman", "Amsterdam", "Ankara", "Antwerp", "Athens", "Auckland",
    "Baku", "Bangkok", "Barcelona", "Beirut", "Belgrade", "Bergen", "Berlin", "Bogotá", "Bologna",
    "Bordeaux", "Boston", "Brisbane", "Brussels", "Budapest", "Cairo", "Calgary", "Cardiff",
    "Caracas", "Casablanca", "Chennai", "Chicago", "Copenhagen", "Córdoba", "Dakar", "Dallas",
    "Delhi", "Denver", "Dhaka", "Dresden", "Dublin", "Durban", "Edinburgh", "Florence", "Geneva",
    "Genoa", "Ghent", "Glasgow", "Hamburg", "Hanoi", "Harare", "Havana", "Helsinki", "Istanbul",
    "Jakarta", "Kampala", "Karachi", "Kigali", "Kraków", "Kyiv", "Kyoto", "Lagos", "Leipzig",
    "Lima", "Lisbon", "Ljubljana", "London", "Luanda", "Lusaka", "Lyon", "Madrid", "Manila",
    "Marseille", "Melbourne", "Milan", "Montreal", "Mumbai", "Munich", "Nairobi", "Naples", "Osaka",
    "Oslo", "Ottawa", "Paris", "Perth", "Porto", "Prague", "Quito", "Rabat", "Riga", "Rome",
    "Santiago", "Seoul", "Seville", "Sofia", "Stockholm", "Sydney", "Tallinn", "Tokyo", "Toronto",
    "Tunis", "Turin",
)  # fmt: skip


def sample_name(length: int, depth: float, number: int) -> str:
    """Returns the name of a sample; `depth` in percent."""
    return f"{length} tokens, {depth:g} %, {number}"


def drafts(
    model: Model,
    *,
    book: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    rounds: int,
    seed: int,
    chat: bool,
    lead: bool,
) -> list[Draft]:
    """Returns the grid, shortest prompts first.

    Args:
        model: the model; prompt and answer fill `length` of its tokens as nearly as they can.
        book: text of the haystacks.
        lengths: tokens of prompt and answer.
        depths: places of the needle in percent of the passage, 0 the start.
        rounds: samples of each cell, each with its own passage, city and number.
        seed: decides all of them.
        chat: prompts will be put into the chat template.
        lead: the answer's first words are read with the prompt.
    """

    def make(length: int, depth: float, number: int) -> Callable[[], Sample]:
        draw = f"{seed} {length} {depth:g} {number}"
        return lambda: _sample(model, book, length, depth, number, draw=draw, chat=chat, lead=lead)

    return [
        Draft(
            sample_name(length, depth, number), TASK, length, make(length, depth, number)
        )
        for length in sorted(lengths)
        for depth in depths
        for number in range(rounds)
    ]  # fmt: skip


def _sample(
    model: Model,
    book: str,
    length: int,
    depth: float,
    number: int,
    *,
    draw: str,
    chat: bool,
    lead: bool,
) -> Sample:
    def build(words: int) -> Prompt:
        prompt = needle_prompt(book, words, depth=depth, draw=draw)
        return prompt if lead else dataclasses.replace(prompt, lead="")

    begins = build(1).lead

    def count_tokens(text: str) -> int:
        return len(tokens_of(model, text, chat=chat, lead=begins))

    with reported_as_user_error(ValueError):
        prompt = fit_prompt(build, count_tokens, length - MAX_NEW_TOKENS)
    return Sample(
        name=sample_name(length, depth, number),
        task=TASK,
        length=length,
        prompt=prompt.text,
        lead=prompt.lead,
        answers=(prompt.answer,),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def needle_prompt(book: str, words: int, *, depth: float, draw: str) -> Prompt:
    """Returns a passage of so many words with the needle in it, the question, and the lead.

    The needle is the original's, on lines of its own, behind the last sentence that ends before
    `depth` percent of the passage; at the start if none does.

    Args:
        book: text of the passage.
        words: of the passage.
        depth: in percent.
        draw: seed of the passage's start, the city and the number.
    """
    rng = random.Random(draw)
    city, number = rng.choice(_CITIES), str(rng.randrange(1_000_000, 10_000_000))
    passage = book_prompt(book, words, seed=rng.randrange(2**32)).text
    place = place_of(passage, depth)
    needle = f"\nThe special magic {city} number is: {number}\n"
    return Prompt(
        text=f"{passage[:place]}{needle}{passage[place:]}\n\n"
        "Give a short, direct, high-quality answer to this question from the text above.\n"
        f"Question: What is the special magic {city} number?\nAnswer:",
        answer=number,
        lead=f" The special magic {city} number is: ",
    )


def place_of(passage: str, depth: float) -> int:
    """Returns the end of the last sentence before `depth` percent of a passage, 0 if none ends."""
    limit = round(len(passage) * depth / 100)
    return len(passage) if limit == len(passage) else passage.rfind(".", 0, limit) + 1


def holds_answer(sample: Sample, answer: str) -> float:
    """Returns 1 if one of the right answers is part of the answer, otherwise 0."""
    return float(any(right in answer for right in sample.answers))
