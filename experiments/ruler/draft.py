"""What a task's builder is given, and what it makes."""

import dataclasses
import random


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt of some size, how its answer begins, and the right answers."""

    prompt: str
    lead: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """All that a model reads before it answers, chat templates apart."""
        return f"{self.prompt} {self.lead}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answers, and where they are found.

    Attributes:
        query: the question.
        answers: right answers.
        gold: documents that a prompt must hold.
        near: documents that are the first to stand beside them.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions, and the documents of all of them, to which their numbers point."""

    items: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides a draft, its sizes apart.

    Attributes:
        seed: of everything drawn at random.
        index: which sample of its task it is.
        length: tokens wanted, the answer's among them.
        text: the haystack.
        questions: for tasks that ask about documents.
    """

    seed: str
    index: int
    length: int
    text: str
    questions: Questions | None = None

    def rng(self) -> random.Random:
        """A fresh generator: drafts of all sizes draw the same."""
        return random.Random(self.seed)
