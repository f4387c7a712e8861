"""The prompts that methods are compared on, as tokens, with the right answer's tokens."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.options import OptionalPath, at_least
from experiments.common.prompts import (
    QUESTIONS,
    Prompt,
    Task,
    book_of,
    build_prompt,
    fit_prompt,
    read_book,
)
from experiments.common.session import check_fits, encode
from models import Model

# The task of a prompt that is a file.
FILE = "file"


class Source(NamedTuple):
    """A prompt before it is tokens.

    Attributes:
        name: the task and its seed, or the file.
        task: the task, or `FILE`.
        build: makes it from a size, or from any if it is a file.
        length: tokens wanted; None for a file, whose length is what it is.
    """

    name: str
    task: str
    build: Callable[[int], Prompt]
    length: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparePrompts:
    """The prompts."""

    tasks: tuple[Task, ...] = ("book", "needle")
    """A book, Python source, a number hidden in a book (or among other such numbers), retrieval
    from pairs of random UUIDs."""
    text: OptionalPath = None
    """Book of book, needle and multi_needle: a UTF-8 file or a folder of .txt files; if not given,
    a chapter."""
    length: int = 4096
    """Tokens that each of these prompts fills, as nearly as it can."""
    prompts: int = 1
    """Prompts of each task, made with the seed and the ones after it."""
    seed: int = 0
    """Seed of the first prompt of each task."""
    prompt_files: tuple[Path, ...] = ()
    """UTF-8 text files, each a whole prompt, besides the tasks (none after a bare --tasks)."""
    chat: bool = True
    """Put questions and prompt files into the model's chat template, if it has one."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, and for a text that nothing would read."""
        at_least("length", self.length, 2)
        at_least("prompts", self.prompts, 1)
        if not self.tasks and not self.prompt_files:
            raise UserError("there is no prompt: name --tasks or --prompt-files")
        for name, values in (("tasks", self.tasks), ("prompt-files", self.prompt_files)):
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names one of them twice; see --prompts and --seed")

    def read(self) -> list[Source]:
        """Returns the prompts; raises UserError for a text that is missing, or not asked for."""
        book = book_of(self.tasks, self.text)
        seeds = range(self.seed, self.seed + self.prompts)
        files = [(path.name, Prompt(text=read_book(path))) for path in self.prompt_files]
        return [
            *(
                Source(f"{task} {seed}", task, _builder(task, seed, book), self.length)
                for task in self.tasks
                for seed in seeds
            ),
            *(Source(name, FILE, lambda _, prompt=prompt: prompt, None) for name, prompt in files),
        ]


def _builder(task: Task, seed: int, book: str) -> Callable[[int], Prompt]:
    return lambda size: build_prompt(task, size, seed=seed, book=book)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as tokens.

    Attributes:
        name: the task and its seed, or the file.
        task: the task.
        tokens: of the prompt, the beginning of the answer among them.
        answer: of what the answer goes on with, empty if nothing is asked.
        length: tokens that the prompt is padded to, so that all of a task share their programs.
    """

    name: str
    task: str
    tokens: list[int]
    answer: list[int]
    length: int

    @property
    def asks(self) -> bool:
        """Whether it asks something; a file may."""
        return self.task == FILE or self.task in QUESTIONS

    @property
    def sha256(self) -> str:
        """Of all tokens."""
        ids = np.array([len(self.tokens), *self.tokens, *self.answer], np.int32)
        return hashlib.sha256(ids.tobytes()).hexdigest()


def tokenise_all(model: Model, sources: Sequence[Source], *, chat: bool) -> list[Reading]:
    """Returns the tokens of all prompts; raises UserError as `tokenise`."""
    with ThreadPoolExecutor() as pool:  # tokenizers leave Python while they work
        readings = pool.map(lambda source: tokenise(model, source, chat=chat), sources)
        return [*tqdm(readings, "tokenising", len(sources), unit="prompt", disable=None)]


def tokenise(model: Model, source: Source, *, chat: bool) -> Reading:
    """Returns a prompt's tokens; raises UserError if text or context are too short for it."""
    name, task = source.name, source.task
    if source.length is None:
        tokens = encode(model, source.build(0).text, chat=chat, max_new_tokens=0)[0].tolist()
        if len(tokens) < 2:
            raise UserError(f"{name} has {len(tokens)} tokens; at least 2 are needed")
        return Reading(name=name, task=task, tokens=tokens, answer=[], length=len(tokens))
    templated = chat and model.tokenizer.has_chat_template and task in QUESTIONS

    def whole(size: int) -> Prompt:
        prompt = source.build(size)
        if task not in QUESTIONS:
            return prompt
        if templated:
            turns = [{"role": "user", "content": prompt.text}]
            text = model.tokenizer.apply_chat_template(turns)
        else:
            text = f"{prompt.text}\n\nAnswer: "
        return dataclasses.replace(prompt, text=text + prompt.lead)

    def ids(text: str) -> list[int]:
        # A chat template writes the first token itself.
        return model.tokenizer.encode(text, add_special_tokens=not templated)

    check_fits(source.length, model)
    with reported_as_user_error(ValueError):
        prompt = fit_prompt(whole, lambda text: len(ids(text)), source.length)
        tokens, both = ids(prompt.text), ids(prompt.text + prompt.answer)
        if prompt.answer:
            # Prompt and answer may share a token; it belongs to the answer.
            same = np.cumprod([a == b for a, b in zip(tokens, both, strict=False)]).sum()
            tokens = both[:same]
        check_fits(len(both), model)
    answer = both[len(tokens) :]
    return Reading(name=name, task=task, tokens=tokens, answer=answer, length=source.length)
