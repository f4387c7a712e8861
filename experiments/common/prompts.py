"""Prompts of a wanted length: a book, facts hidden in a book, pairs of keys and values, code.

All are functions of a seed. Builders take a size (words or pairs); `fit_prompt` finds the size that
fills a number of tokens.
"""

import dataclasses
import functools
import itertools
import json
import random
import re
import sysconfig
import uuid
from collections.abc import Callable, Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from experiments.common.errors import UserError

Task = Literal["book", "code", "needle", "multi_needle", "key_value"]

# Tasks that ask something, and tasks whose text comes from a book.
QUESTIONS: frozenset[Task] = frozenset({"needle", "multi_needle", "key_value"})
FROM_BOOK: frozenset[Task] = frozenset({"book", "needle", "multi_needle"})

LONGER_TEXT = "name a longer one with --text"

CHAPTER = "moby_dick_chapter_41.txt"

_PLACES = ("lighthouse", "harbour", "mill", "observatory", "abbey", "foundry", "archive", "orchard")
_FACTS = 4  # of a multi_needle prompt
_GOLDEN = (5**0.5 - 1) / 2
# Folders of the standard library that hold tests, or what is not of the library.
_NO_SOURCE = frozenset({"test", "tests", "site-packages", "__pycache__"})


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
    text = "\n\n".join(map(_read_text, files)).strip()
    if not text:
        raise UserError(f"{path} holds no text")
    return text


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def book_of(tasks: Collection[Task], path: Path | None) -> str:
    """Returns the book that some tasks need: a chapter without a path, nothing if none needs one.

    Raises:
        UserError: no task would read the path, or it cannot be read.
    """
    if FROM_BOOK.isdisjoint(tasks):
        if path is None:
            return ""
        wanted = ", ".join(sorted(FROM_BOOK))
        raise UserError(f"--text belongs to --tasks {wanted}; got --tasks {' '.join(tasks)}")
    return packaged_chapter() if path is None else read_book(path)


def build_prompt(task: Task, size: int, *, seed: int, book: str) -> Prompt:
    """Returns a prompt of a task; its size is in pairs for `key_value`, in words for the others."""
    match task:
        case "key_value":
            return key_value_prompt(size, seed=seed)
        case "code":
            return code_prompt(size, seed=seed)
        case "needle":
            return needle_prompt(book, size, seed=seed)
        case "multi_needle":
            return multi_needle_prompt(book, size, seed=seed)
        case "book":
            return book_prompt(book, size, seed=seed)


def hide(fact: str, paragraphs: Sequence[str], depth: float) -> str:
    """Returns the paragraphs with a fact among them, at a depth from 0 (start) to 1 (end)."""
    place = round(depth * len(paragraphs))
    return "\n\n".join([*paragraphs[:place], fact, *paragraphs[place:]])


def book_prompt(book: str, words: int, *, seed: int) -> Prompt:
    """Returns a passage of a book, which begins at a paragraph that the seed decides.

    Where the book ends before the passage does, it goes on with the beginning.
    """
    return Prompt(text=_passage(book, words, random.Random(seed)))


def code_prompt(words: int, *, seed: int) -> Prompt:
    """Returns Python source: files of the running Python's standard library in a random order.

    Files are whole, but for the last. Another version of Python makes another prompt.
    """
    files = list(_library())
    random.Random(seed).shuffle(files)
    sources, missing = [], words
    for file in files:
        sources.append(_source(file))
        missing -= len(sources[-1].split())
        if missing <= 0:
            break
    return Prompt(text=first_words("\n\n\n".join(sources), words))


def needle_prompt(book: str, words: int, *, seed: int, depth: float | None = None) -> Prompt:
    """Returns a passage of a book with a number hidden in it, and the question for the number.

    Without a depth, the seed decides it: successive seeds spread evenly over 0.1 to 0.9.
    """
    rng = random.Random(seed)
    place, number = rng.choice(_PLACES), _number(rng)
    if depth is None:
        depth = 0.1 + 0.8 * ((0.5 + seed * _GOLDEN) % 1.0)
    return _question(_passage(book, words, rng), [(place, number, depth)], place)


def multi_needle_prompt(book: str, words: int, *, seed: int) -> Prompt:
    """Returns a passage of a book with several numbers in it, and the question for one of them.

    The numbers lie one in each part of 0.1 to 0.9 of the passage; the others mislead.
    """
    rng = random.Random(seed)
    places = rng.sample(_PLACES, _FACTS)
    depths = [0.1 + 0.8 * (part + rng.random()) / _FACTS for part in range(_FACTS)]
    facts = [(place, _number(rng), depth) for place, depth in zip(places, depths, strict=True)]
    return _question(_passage(book, words, rng), facts, rng.choice(places))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _question(passage: str, facts: Sequence[tuple[str, str, float]], asked: str) -> Prompt:
    """A passage with facts (place, number, depth) hidden in it, and the question for a place."""
    for place, number, depth in facts:
        fact = f"The {place} keeper's magic number is {number}."
        passage = hide(fact, passage.split("\n\n"), depth)
    [answer] = [number for place, number, _ in facts if place == asked]
    return Prompt(
        text=f"Read this part of a book.\n\n{passage}\n\n"
        f"Question: What is the {asked} keeper's magic number?",
        answer=answer,
        lead=f"The {asked} keeper's magic number is ",
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
    return build(fit_size(lambda size: count_tokens(build(size).text), length))


def fit_size(
    count: Callable[[int], int], length: int, *, first: int | None = None, remedy: str = LONGER_TEXT
) -> int:
    """Returns the largest size whose prompt has at most `length` tokens.

    Args:
        count: tokens of a prompt of a size of at least 1; sizes beyond what there is add none.
        length: tokens wanted.
        first: a size that is expected to be near, if one is known.
        remedy: what to do if there is too little to fill the length.

    Raises:
        UserError: the smallest prompt is longer, or the largest a good deal shorter.
    """
    smallest = count(1)
    if smallest > length:
        raise UserError(
            f"the shortest such prompt has {smallest} tokens, {length} were asked for; ask for more"
        )
    # Tokens are nearly a line over sizes, and those of a long text take long to count: the next
    # size is where the line through two known ones meets the length. A word has at least a token.
    before, low, high, step = (0, 0), (1, smallest), None, 0
    while high is None or high[0] - low[0] > 1:
        step += 1
        (x, y), (other_x, other_y) = low, high or before
        size = x + max(1, int((length - y) / max((other_y - y) / (other_x - x), 1.0)))
        if step == 1:  # of few words, too many tokens each
            size = max(2, length // 64 if first is None else first)
        if high is not None:  # halving now and then bounds the steps, whatever the text
            size = min(size, high[0] - 1) if step % 4 else (x + high[0]) // 2
        tokens = count(size)
        if tokens > length:
            high = size, tokens
        elif high is None and tokens == y:  # there is no more
            raise UserError(f"the text has only {tokens} tokens, {length} were asked for; {remedy}")
        else:
            before, low = low, (size, tokens)
    return low[0]


def _passage(book: str, words: int, rng: random.Random) -> str:
    paragraphs = book.strip().split("\n\n")
    start = rng.randrange(len(paragraphs))
    return first_words("\n\n".join([*paragraphs[start:], *paragraphs[:start]]), words)


def first_words(text: str, words: int) -> str:
    """The text up to the end of so many words; all of it if it has fewer."""
    end = 0
    for match in itertools.islice(re.finditer(r"\S+", text), words):
        end = match.end()
    return text[:end]


@functools.cache
def _library() -> tuple[Path, ...]:
    """Source files of the standard library, tests apart, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(
        file
        for file in sorted(root.rglob("*.py"))
        if _NO_SOURCE.isdisjoint(file.relative_to(root).parts)
    )
    if not files:
        raise UserError(f"there is no Python source in {root}; leave out --tasks code")
    return files


@functools.cache
def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()
