"""The calibration prompts of `minference search`. Field docstrings are the `--help` text."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

from experiments.common.errors import UserError
from experiments.common.options import OptionalPath, at_least
from experiments.common.prompts import (
    Prompt,
    book_prompt,
    key_value_prompt,
    needle_prompt,
    packaged_chapter,
    read_book,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The prompts that patterns are compared on."""

    task: Literal["key_value", "needle", "book"] = "key_value"
    """Retrieval from pairs of random UUIDs (as in the paper), a number hidden in a book, a book."""
    text: OptionalPath = None
    """Book for the latter two: a UTF-8 file or a folder of .txt files; if not given, a chapter."""
    length: int = 4096
    """Tokens of a prompt; the paper takes 30,000."""
    prompts: int = 1
    """Prompts, made with the seed and the ones after it."""
    seed: int = 0
    """Seed of the first prompt."""
    chat: bool = True
    """Put questions into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, and for a book that would not be read."""
        at_least("length", self.length, 1)
        at_least("prompts", self.prompts, 1)
        if self.text is not None and self.task == "key_value":
            raise UserError("--text belongs to --task needle and book, got --task key_value")

    @functools.cached_property
    def book(self) -> str:
        """The text of the book; raises UserError if it cannot be read."""
        if self.task == "key_value":
            return ""
        return packaged_chapter() if self.text is None else read_book(self.text)

    def build(self, size: int, seed: int) -> Prompt:
        """Returns a prompt of a number of pairs or words."""
        if self.task == "key_value":
            return key_value_prompt(size, seed=seed)
        build = needle_prompt if self.task == "needle" else book_prompt
        return build(self.book, size, seed=seed)

    def settings(self) -> dict[str, Any]:
        """Returns what decides the prompts."""
        text = hashlib.sha256(self.book.encode()).hexdigest()
        return dataclasses.asdict(self) | {"text": text if self.book else None}
