"""The prompts that methods are compared on, as tokens, with the right answer's tokens."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.options import OptionalPath, at_least
from experiments.common.prompts import Prompt, fit_prompt, read_book
from experiments.common.session import encode
from experiments.search.options import CalibrationOptions
from models import Model
from models.common.checks import check_context

Task = Literal["book", "needle", "key_value"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparePrompts:
    """The prompts."""

    tasks: tuple[Task, ...] = ("book", "needle")
    """A book, a number hidden in a book, retrieval from pairs of random UUIDs."""
    text: OptionalPath = None
    """Book for the former two: a UTF-8 file or a folder of .txt files; if not given, a chapter."""
    length: int = 4096
    """Tokens of each of these prompts."""
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
        if self.text is not None and not {"book", "needle"} & set(self.tasks):
            raise UserError("--text belongs to --tasks book and needle, which are not asked for")

    def read(self) -> list[tuple[str, CalibrationOptions | str]]:
        """Returns each prompt's name, and its options or its text; raises UserError."""
        found: list[tuple[str, CalibrationOptions | str]] = []
        for task in self.tasks:
            text = None if task == "key_value" else self.text
            for seed in range(self.seed, self.seed + self.prompts):
                options = CalibrationOptions(task=task, text=text, length=self.length, seed=seed)
                _ = options.book  # a missing file is told before the model is loaded
                found.append((f"{task} {seed}", options))
        return [*found, *((path.name, read_book(path)) for path in self.prompt_files)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as tokens.

    Attributes:
        name: the task and its seed, or the file.
        tokens: of the prompt, the beginning of the answer among them.
        answer: of what the answer goes on with, empty if nothing is asked.
    """

    name: str
    tokens: list[int]
    answer: list[int]

    @property
    def sha256(self) -> str:
        """Of all tokens."""
        ids = np.array([len(self.tokens), *self.tokens, *self.answer], np.int32)
        return hashlib.sha256(ids.tobytes()).hexdigest()


def tokenise(model: Model, name: str, source: CalibrationOptions | str, *, chat: bool) -> Reading:
    """Returns a prompt's tokens; raises UserError if text or context are too short for it."""
    if isinstance(source, str):
        tokens = encode(model, source, chat=chat, max_new_tokens=0)[0].tolist()
        if len(tokens) < 2:
            raise UserError(f"{name} has {len(tokens)} tokens; at least 2 are needed")
        return Reading(name=name, tokens=tokens, answer=[])
    templated = chat and model.tokenizer.has_chat_template

    def whole(size: int) -> Prompt:
        prompt = source.build(size, source.seed)
        if not prompt.answer:
            return prompt
        if templated:
            turns = [{"role": "user", "content": prompt.text}]
            text = model.tokenizer.apply_chat_template(turns)
        else:
            text = f"{prompt.text}\n\nAnswer: "
        return dataclasses.replace(prompt, text=text + prompt.lead)

    def ids(text: str) -> list[int]:
        # A chat template writes the first token itself.
        special = not (templated and source.task != "book")
        return model.tokenizer.encode(text, add_special_tokens=special)

    with reported_as_user_error(ValueError):
        check_context(source.length, model.config)
        prompt = fit_prompt(whole, lambda text: len(ids(text)), source.length)
        tokens, both = ids(prompt.text), ids(prompt.text + prompt.answer)
        if prompt.answer:
            # Prompt and answer may share a token; it belongs to the answer.
            same = np.cumprod([a == b for a, b in zip(tokens, both, strict=False)]).sum()
            tokens = both[:same]
        check_context(len(both), model.config)
    return Reading(name=name, tokens=tokens, answer=both[len(tokens) :])
