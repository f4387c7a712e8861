"""RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654) for any tokenizer and number of tokens.

Sizes and prompts are those published; each task's module says what is our own. Published sizes
grow in steps, of 500 words for instance; ours are fitted to each sample, and fill the length.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from experiments.common.errors import UserError
from experiments.common.prompts import LONGER_TEXT, fit_size, packaged_chapter
from experiments.evaluation.sample import Sample
from experiments.ruler.common_words import common_words
from experiments.ruler.draft import Draft, Questions, Request
from experiments.ruler.frequent_words import frequent_words
from experiments.ruler.niah import Needles
from experiments.ruler.qa import ask_about_documents, read_hotpotqa, read_squad
from experiments.ruler.variable_tracking import variable_tracking

TaskName = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """How a task's samples are made and scored.

    Attributes:
        max_new_tokens: tokens that an answer may take.
        builder: makes a draft from a request, a size of at least 1 and a rest of at least 0; it has
            no state, and the rest is ignored unless `has_rest`.
        has_rest: whether the size is in units so large that a rest has to fill what is left.
        match: whether all right answers are wanted, or any of them.
        source: file of the questions, and what reads it, if the task needs one.
        remedy: what to do if there is too little to fill a length.
    """

    max_new_tokens: int
    builder: Callable[[Request, int, int], Draft]
    has_rest: bool = False
    match: Literal["all", "any"] = "all"
    source: tuple[str, Callable[[Path], Questions]] | None = None
    remedy: str = LONGER_TEXT


def _niah(needles: Needles) -> Task:
    return Task(max_new_tokens=128, builder=needles, has_rest=needles.haystack == "needles")


def _qa(file: str, read: Callable[[Path], Questions]) -> Task:
    return Task(
        max_new_tokens=32,
        builder=ask_about_documents,
        has_rest=True,
        match="any",
        source=(file, read),
        remedy="ask for fewer: there are no more documents",
    )


tasks: Mapping[str, Task] = MappingProxyType(
    {
        "niah_single_1": _niah(Needles(haystack="noise")),
        "niah_single_2": _niah(Needles()),
        "niah_single_3": _niah(Needles(value="uuid")),
        "niah_multikey_1": _niah(Needles(keys=4)),
        "niah_multikey_2": _niah(Needles(haystack="needles")),
        "niah_multikey_3": _niah(Needles(haystack="needles", key="uuid", value="uuid")),
        "niah_multivalue": _niah(Needles(values=4)),
        "niah_multiquery": _niah(Needles(keys=4, queries=4)),
        "vt": Task(max_new_tokens=30, builder=variable_tracking),
        "cwe": Task(
            max_new_tokens=120,
            builder=common_words,
            remedy="name one with more different words with --text",
        ),
        "fwe": Task(max_new_tokens=50, builder=frequent_words),
        "qa_1": _qa("squad.json", read_squad),
        "qa_2": _qa("hotpotqa.json", read_hotpotqa),
    }
)

NO_DOWNLOAD: tuple[TaskName, ...] = tuple(
    name for name in get_args(TaskName) if tasks[name].source is None
)


def missing_files(names: Collection[str], folder: Path | None) -> dict[str, str]:
    """Returns the tasks that cannot be built, each with the file that it lacks in the folder."""
    files = {name: source[0] for name in names if (source := tasks[name].source) is not None}
    return {
        name: file
        for name, file in files.items()
        if folder is None or not (folder / file).is_file()
    }


def read_questions(task: str, folder: Path | None) -> Questions | None:
    """Returns the questions of a task; None for a task that needs none.

    Raises:
        UserError: the task's file is missing or unreadable.
    """
    source = tasks[task].source
    if source is None:
        return None
    file, read = source
    if folder is None:
        raise UserError(f"{task} needs a folder with {file}; name it, or leave the task out")
    return read(folder / file)


def sample_name(task: str, length: int, index: int) -> str:
    """Returns the name of a sample."""
    return f"{task}-{length}-{index}"


def sample_maker(
    task: str,
    count_tokens: Callable[[str, str], int],
    length: int,
    seed: int,
    text: str | None = None,
    questions: Questions | None = None,
) -> Callable[[int], Sample]:
    """Returns what makes the numbered samples of a task, the same ones in any order.

    Prompt, lead and answer of a sample together take `length` tokens. Answers count with all tokens
    that they may take, as published. A text or questions that do not suffice are an error when a
    sample is made: nothing is repeated.

    Args:
        task: a name of `tasks`.
        count_tokens: how many tokens the model reads for a prompt and the answer's beginning.
        length: tokens wanted.
        seed: with the task, the length and the number of the sample, decides all that is random.
        text: the haystack where it is text; its words are also words of `cwe`. Without one, the
            packaged chapter, about 5,400 tokens.
        questions: what `read_questions` returned for the task.
    """
    chosen = tasks[task]
    text = packaged_chapter() if text is None else text

    def fit(index: int, first: int | None) -> tuple[Draft, int]:
        request = Request(
            seed=f"{seed}-{sample_name(task, length, index)}",
            index=index,
            length=length,
            text=text,
            questions=questions,
        )
        try:
            return _fit(chosen, request, count_tokens, first)
        except UserError as error:
            raise UserError(f"{task} of {length} tokens cannot be made: {error}") from error

    # Sizes of all samples are near that of the first.
    near = functools.cache(lambda: fit(0, None)[1])

    def make(index: int) -> Sample:
        draft, _ = fit(index, near())
        return Sample(
            name=sample_name(task, length, index),
            task=task,
            length=length,
            prompt=draft.prompt,
            lead=f" {draft.lead}",
            answers=draft.answers,
            max_new_tokens=chosen.max_new_tokens,
        )

    return make


def _fit(
    task: Task, request: Request, count_tokens: Callable[[str, str], int], first: int | None
) -> tuple[Draft, int]:
    """The largest draft that fits, and its size."""

    def count(size: int, rest: int) -> int:
        draft = task.builder(request, size, rest)
        return count_tokens(draft.prompt, f" {draft.lead}") + task.max_new_tokens

    size = fit_size(lambda size: count(size, 0), request.length, first=first, remedy=task.remedy)
    rest = 0
    if task.has_rest:
        rest = fit_size(lambda more: count(size, more - 1), request.length, first=2) - 1
    return task.builder(request, size, rest), size
