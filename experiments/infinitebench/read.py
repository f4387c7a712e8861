"""The data set as it is released: a JSONL file for each task."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError, reported_as_user_error
from experiments.evaluation.sample import Sample
from experiments.infinitebench.metrics import check_metric
from experiments.infinitebench.prompts import Question, ask
from experiments.infinitebench.tasks import (
    CHOICES,
    LETTERS,
    MAX_NEW_TOKENS,
    Task,
    check_task,
    sample_name,
)
from experiments.infinitebench.truncate import truncated_prompt
from models.common.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """A released file that was checked.

    Attributes:
        path: the file.
        task: its task.
        starts: where each sample's line begins, in bytes.
        sha256: of the whole file.
    """

    path: Path
    task: Task
    starts: tuple[int, ...]
    sha256: str


def check_file(path: Path, task: str, number: int | None = None) -> Released:
    """Returns where a file's samples lie, which needs no model to know.

    Args:
        path: the released file of the task.
        task: name of the task.
        number: check only the first so many samples, all if None.

    Raises:
        UserError: there is no such task or file, the task cannot be scored here, or a line of the
            file is not what the task has.
    """
    known = check_task(task)
    check_metric(known)
    starts, position = [], 0
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            for line, content in enumerate(file, 1):
                if len(starts) == number:
                    break
                if content.strip():
                    starts.append(position)
                    try:
                        _question(known, content)
                    except UserError as error:
                        raise UserError(f"{path}, line {line}: {error}") from error
                position += len(content)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; {task} needs {task}.jsonl of the data "
            "set xinrongzhang2022/InfiniteBench"
        ) from error
    if not starts:
        raise UserError(f"{path} holds no sample of {task}")
    return Released(path=path, task=known, starts=tuple(starts), sha256=digest)


def read_sample(
    released: Released,
    place: int,
    *,
    tokenizer: Tokenizer,
    count_tokens: Callable[[str, str], int],
    length: int,
) -> Sample:
    """Returns one sample of a released file.

    Args:
        released: the file.
        place: of the sample in it.
        tokenizer: the model's.
        count_tokens: how many tokens the model reads for a prompt and the answer's beginning, its
            chat template included.
        length: tokens that prompt, lead and answer may take together. Of a prompt that takes more,
            the middle of its long text is left out.

    Raises:
        UserError: the file has changed, or the question alone is longer than `length`.
    """
    task = released.task
    max_new_tokens = MAX_NEW_TOKENS[task]

    def token_spans(text: str) -> list[tuple[int, int]]:
        return tokenizer.backend.encode(text, add_special_tokens=False).offsets

    with reported_as_user_error(OSError), released.path.open("rb") as file:
        file.seek(released.starts[place])
        question = _question(task, file.readline())
    prompt = truncated_prompt(
        question,
        token_spans=token_spans,
        count_tokens=count_tokens,
        room=length - max_new_tokens,
    )
    return Sample(
        name=sample_name(task, length, place),
        task=task,
        length=length,
        prompt=prompt,
        lead=question.lead,
        answers=question.answers,
        max_new_tokens=max_new_tokens,
    )


def _question(task: Task, line: bytes) -> Question:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error}); download the file again") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error}); download the file again") from error
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, got {type(record).__name__}")
    for name in ("context", "input"):
        if not isinstance(record.get(name), str):
            raise UserError(f"expected text as `{name}`, got {_brief(record.get(name))}")
    answers, options = _answers(record.get("answer")), ()
    if task in CHOICES:
        options = _options(record.get("options"))
        answers = _right_option(answers, options)
    return ask(
        task, context=record["context"], asked=record["input"], options=options, answers=answers
    )


def _answers(answer: Any) -> tuple[str, ...]:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(type(each) in (str, int, float) for each in answers):
        raise UserError(
            f"expected text, a number, or a list of them as `answer`, got {_brief(answer)}"
        )
    return tuple(map(str, answers))


def _options(options: Any) -> tuple[str, ...]:
    right = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not right or len(options) != len(LETTERS):
        raise UserError(f"expected four texts as `options`, got {_brief(options)}")
    return tuple(options)


def _right_option(answers: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, str]:
    """The right option and its letter, which a released answer may lack."""
    if len(answers) == 2 and answers[1] in tuple(LETTERS):
        return answers[0], answers[1]
    if len(answers) != 1 or answers[0] not in options:
        raise UserError(f"expected one of the options as `answer`, got {_brief(list(answers))}")
    return answers[0], LETTERS[options.index(answers[0])]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"
