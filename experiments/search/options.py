"""The calibration prompts of `minference search`. Field docstrings are the `--help` text."""

import dataclasses
import functools
import hashlib
import platform
from typing import Any

from experiments.common.errors import UserError
from experiments.common.options import OptionalPath, at_least
from experiments.common.prompts import FROM_BOOK, Prompt, Task, book_of, build_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The prompts that patterns are compared on."""

    tasks: tuple[Task, ...] = ("key_value",)
    """Retrieval from pairs of random UUIDs (as in the paper), a number hidden in a book (or among
    other such numbers), a book, Python source."""
    text: OptionalPath = None
    """Book of book, needle and multi_needle: a UTF-8 file or a folder of .txt files; if not given,
    a chapter."""
    length: int = 4096
    """Tokens of a prompt; the paper takes 30,000."""
    prompts: int = 1
    """Prompts of each task, made with the seed and the ones after it."""
    seed: int = 0
    """Seed of the first prompt of each task."""
    chat: bool = True
    """Put questions into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, and for a book that would not be read."""
        at_least("length", self.length, 1)
        at_least("prompts", self.prompts, 1)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(
                f"--tasks must name each task once, at least one; got {' '.join(self.tasks)!r}"
            )
        if self.text is not None and FROM_BOOK.isdisjoint(self.tasks):
            _ = self.book  # tells what is wrong

    @functools.cached_property
    def book(self) -> str:
        """The text of the book; raises UserError if it cannot be read."""
        return book_of(self.tasks, self.text)

    @property
    def wanted(self) -> list[tuple[Task, int]]:
        """The task and the seed of each prompt."""
        seeds = range(self.seed, self.seed + self.prompts)
        return [(task, seed) for task in self.tasks for seed in seeds]

    def build(self, task: Task, size: int, seed: int) -> Prompt:
        """Returns a prompt of a number of pairs or words."""
        return build_prompt(task, size, seed=seed, book=self.book)

    def describe(self) -> str:
        """The tasks in words."""
        return " and ".join(self.tasks)

    def settings(self) -> dict[str, Any]:
        """Returns what decides the prompts."""
        text = hashlib.sha256(self.book.encode()).hexdigest()
        python = platform.python_version() if "code" in self.tasks else None
        return dataclasses.asdict(self) | {"text": text if self.book else None, "python": python}
