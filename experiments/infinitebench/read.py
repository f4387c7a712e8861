"""The data set as it is released: a JSONL file for each task."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.evaluation.sample import Sample
from experiments.infinitebench.metrics import check_metric
from experiments.infinitebench.prompts import Question, ask
from experiments.infinitebench.tasks import (
    CHOICES,
    LETTERS,
    MAX_NEW_TOKENS,
    Task,
    check_task,
)
from experiments.infinitebench.truncate import truncated_prompt
from models.common.tokenizer import Tokenizer


def check_file(path: Path, task: str, number: int | None = None) -> int:
    """Returns how many samples `read_samples` will read, which needs no model to know.

    Args:
        path: the released file of the task.
        task: name of the task.
        number: read only the first so many, all if None.

    Raises:
        UserError: there is no such task or file, the task cannot be scored here, or a line of the
            file is not what the task has.
    """
    known = check_task(task)
    check_metric(known)
    count = sum(1 for _ in itertools.islice(_questions(path, known), number))
    if not count:
        raise UserError(f"{path} holds no sample of {task}")
    return count


def read_samples(
    path: Path,
    task: str,
    *,
    tokenizer: Tokenizer,
    count_tokens: Callable[[str], int],
    length: int,
    number: int | None = None,
) -> Iterator[Sample]:
    """Yields the samples of a released file; `check_file` first says whether it can be used.

    Args:
        path: the released file of the task.
        task: name of the task.
        tokenizer: the model's.
        count_tokens: how many tokens the model reads for a text, its chat template included.
        length: tokens that prompt, lead and answer may take together. Of a prompt that takes more,
            the middle of its long text is left out.
        number: read only the first so many, all if None.

    Raises:
        UserError: as `check_file`, or the question alone is longer than `length`.
    """
    known = check_task(task)
    max_new_tokens = MAX_NEW_TOKENS[known]

    def token_spans(text: str) -> list[tuple[int, int]]:
        return tokenizer.backend.encode(text, add_special_tokens=False).offsets

    for place, question in enumerate(itertools.islice(_questions(path, known), number)):
        yield Sample(
            name=f"{task}-{length}-{place}",
            task=task,
            length=length,
            prompt=truncated_prompt(
                question,
                token_spans=token_spans,
                count_tokens=count_tokens,
                room=length - max_new_tokens,
            ),
            lead=question.lead,
            answers=question.answers,
            max_new_tokens=max_new_tokens,
        )


def _questions(path: Path, task: Task) -> Iterator[Question]:
    try:
        with path.open(encoding="utf-8") as lines:
            for line, text in enumerate(lines, 1):
                if text.strip():
                    try:
                        yield _question(task, text)
                    except UserError as error:
                        raise UserError(f"{path}, line {line}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); download it again") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; expected {task}.jsonl of the data set "
            "xinrongzhang2022/InfiniteBench"
        ) from error


def _question(task: Task, text: str) -> Question:
    try:
        record = json.loads(text)
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
