"""`minference ruler`: RULER's tasks at several lengths, and the effective length."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.errors import UserError
from experiments.common.options import OptionalPath, all_different, at_least
from experiments.common.prompts import packaged_chapter, read_book
from experiments.common.session import tokens_of
from experiments.evaluation.options import Evaluation
from experiments.evaluation.run import evaluate
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft
from experiments.ruler.draft import Questions
from experiments.ruler.report import averages_picture, grid_table, in_words
from experiments.ruler.samples import (
    NO_DOWNLOAD,
    TaskName,
    missing_files,
    read_questions,
    sample_maker,
    sample_name,
    tasks,
)
from experiments.ruler.scores import score
from models import Model

_SHORTEST = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ruler(Evaluation):
    """RULER: 13 synthetic tasks at several lengths, and up to which length a model does well."""

    tasks: tuple[TaskName, ...] = NO_DOWNLOAD
    """Tasks; if not given, the 11 that need no download."""
    questions: OptionalPath = None
    """Folder of the data sets of qa_1 (squad.json: SQuAD's dev-v2.0.json) and qa_2 (hotpotqa.json:
    HotpotQA's hotpot_dev_distractor_v1.json); a task whose file is missing is skipped."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of prompt and answer. Published ones are 4096, 8192 and so on to 131072."""
    samples: int = 20
    """Samples of each task and length; the paper takes 200."""
    text: OptionalPath = None
    """Haystack: a UTF-8 file or a folder of .txt files, at least as long as the longest length; if
    not given, a chapter of about 5,400 tokens."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, or options that contradict each other."""
        super().__post_init__()
        at_least("samples", self.samples, 1)
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            all_different(name, values)
        at_least("lengths", min(self.lengths), _SHORTEST)
        needing = [name for name, task in tasks.items() if task.source]
        if self.questions is not None and not set(needing) & set(self.tasks):
            raise UserError(f"--questions belongs to --tasks {' '.join(needing)}; name one of them")

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        console = Console()
        missing = missing_files(self.tasks, self.questions)
        for task, file in missing.items():
            where = self.questions or "--questions FOLDER"
            console.print(f"skipped: {task}, there is no {file} in {where}", soft_wrap=True)
        chosen = [task for task in self.tasks if task not in missing]
        if not chosen:
            raise UserError("every task asked for lacks its file; name its folder with --questions")
        text = packaged_chapter() if self.text is None else read_book(self.text)
        questions = {task: self._questions(task) for task in chosen}
        lengths = sorted(self.lengths)
        scores = evaluate(
            self,
            settings={"tasks": chosen, "text_sha256": _sha256(text), **self._digests(chosen)},
            drafts=functools.partial(
                drafts, questions=questions, lengths=lengths, samples=self.samples, text=text,
                seed=self.seed, chat=self.chat,
            ),
            metric=metric,
        )  # fmt: skip
        for label, found in scores.items():
            console.print(grid_table(found, title=label))
            console.print(in_words(found), soft_wrap=True)
        title = f"{Path(self.model.model).name}, {len(chosen)} of {len(tasks)} tasks"
        picture = averages_picture(scores, title=title, path=self.folder / "ruler.png")
        for path in (picture, self.folder / "record.jsonl"):
            console.print(f"written: {path}", soft_wrap=True)

    def _questions(self, task: TaskName) -> Questions | None:
        questions = read_questions(task, self.questions)
        if questions is not None and len(questions.items) < self.samples:
            raise UserError(
                f"{task} has {len(questions.items)} questions, but --samples is {self.samples}; "
                "ask for fewer"
            )
        return questions

    def _digests(self, chosen: Collection[TaskName]) -> dict[str, Any]:
        files = {name: source[0] for name in chosen if (source := tasks[name].source) is not None}
        return {
            f"{name}_sha256": hashlib.sha256((self.questions / file).read_bytes()).hexdigest()
            for name, file in files.items()
            if self.questions is not None
        }


def drafts(
    model: Model,
    *,
    questions: dict[TaskName, Questions | None],
    lengths: list[int],
    samples: int,
    text: str,
    seed: int,
    chat: bool,
) -> list[Draft]:
    """Returns samples before they are made, shortest first.

    Args:
        model: the model; prompt and answer fill `length` of its tokens as nearly as they can.
        questions: of the tasks wanted, None for those that need none.
        lengths: tokens of prompt and answer.
        samples: of each task and length.
        text: the haystack.
        seed: decides everything random.
        chat: prompts will be put into the chat template.
    """

    def count_tokens(prompt: str, lead: str) -> int:
        return len(tokens_of(model, prompt, chat=chat, lead=lead))

    def made(task: TaskName, length: int) -> Callable[[int], Callable[[], Sample]]:
        make = sample_maker(task, count_tokens, length, seed, text, questions[task])
        return lambda index: functools.partial(make, index)

    return [
        Draft(sample_name(task, length, index), task, length, make(index))
        for length in lengths
        for task in questions
        for make in [made(task, length)]
        for index in range(samples)
    ]


def metric(sample: Sample, answer: str) -> float:
    """Returns from 0 to 1 how many of the right answers an answer holds, as published."""
    return score(sample.task, answer, sample.answers)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
