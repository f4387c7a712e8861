"""Prompts of a wanted length: a book, a fact hidden in a book, and pairs of keys and values.

All are functions of a seed. Builders take a size (words or pairs); `fit_prompt` finds the size that
fills a number of tokens.
"""

import dataclasses
import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from experiments.common.errors import UserError

CHAPTER = "moby_dick_chapter_41.txt"

_PLACES = ("lighthouse", "harbour", "mill", "observatory", "abbey", "foundry", "archive", "orchard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, what a right answer to it holds (empty if nothing is asked), and how it begins."""

    text: str
    answer: str = ""
    lead: str = ""


def packaged_chapter() -> str:
    """Returns chapter 41 of Moby Dick, about 5,400 tokens."""
    return resources.files("experiments.demo").joinpath(CHAPTER).read_text(encoding="utf-8")


def read_book(path: Path) -> str:
    """Returns the text of a UTF-8 file, or of all .txt files of a folder in the order of names.

    Raises:
        UserError: there is no such file, no text in it, or it is not UTF-8.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"there is no .txt file in {path}; name a text file, or a folder of them")
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error
    if not text:
        raise UserError(f"{path} holds no text")
    return text


def hide(fact: str, paragraphs: Sequence[str], depth: float) -> str:
    """Returns the paragraphs with a fact among them, at a depth from 0 (start) to 1 (end)."""
    place = round(depth * len(paragraphs))
    return "\n\n".join([*paragraphs[:place], fact, *paragraphs[place:]])


def book_prompt(book: str, words: int, *, seed: int) -> Prompt:
    """Returns a passage of a book, which begins at a paragraph that the seed decides.

    Where the book ends before the passage does, it goes on with the beginning.
    """
    return Prompt(text=_passage(book, words, random.Random(seed)))


def needle_prompt(book: str, words: int, *, seed: int, depth: float = 0.5) -> Prompt:
    """Returns a passage of a book with a number hidden in it, and the question for the number."""
    rng = random.Random(seed)
    place, number = rng.choice(_PLACES), str(rng.randrange(1_000_000, 10_000_000))
    passage = _passage(book, words, rng).split("\n\n")
    text = hide(f"The {place} keeper's magic number is {number}.", passage, depth)
    question = f"What is the {place} keeper's magic number?"
    return Prompt(
        text=f"Read this part of a book.\n\n{text}\n\nQuestion: {question}",
        answer=number,
        lead=f"The {place} keeper's magic number is ",
    )


def key_value_prompt(pairs: int, *, seed: int) -> Prompt:
    """Returns a JSON object of random UUIDs, and the question for the value of one key."""
    rng = random.Random(seed)
    draw = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    table = {draw(): draw() for _ in range(pairs)}
    key = rng.choice(list(table))
    text = (
        "This JSON object maps keys to values.\n\n"
        f"{json.dumps(table, indent=0)}\n\n"
        f'Question: Which value belongs to the key "{key}"?'
    )
    return Prompt(text=text, answer=table[key], lead=f'The value of the key "{key}" is "')


def fit_prompt(
    build: Callable[[int], Prompt], count_tokens: Callable[[str], int], length: int
) -> Prompt:
    """Returns the largest prompt of at most `length` tokens.

    Args:
        build: makes a prompt of a size of at least 1; sizes beyond what there is change nothing.
        count_tokens: how many tokens the model reads for a text.
        length: tokens wanted.

    Raises:
        UserError: the smallest prompt is longer, or the largest a good deal shorter.
    """
    smallest = count_tokens(build(1).text)
    if smallest > length:
        raise UserError(f"the shortest such prompt has {smallest} tokens, {length} were asked for")
    low, high, reached = 1, 2, smallest
    while (tokens := count_tokens(build(high).text)) <= length:
        if tokens == reached:  # there is no more
            raise UserError(
                f"the text has only {tokens} tokens, {length} were asked for; name a longer one "
                "with --text"
            )
        low, high, reached = high, 2 * high, tokens
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(build(middle).text) <= length:
            low = middle
        else:
            high = middle
    return build(low)


def _passage(book: str, words: int, rng: random.Random) -> str:
    paragraphs = book.strip().split("\n\n")
    start = rng.randrange(len(paragraphs))
    text = "\n\n".join([*paragraphs[start:], *paragraphs[:start]])
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[min(words, len(ends)) - 1]]
