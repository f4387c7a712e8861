"""`minference infinitebench`: its 12 tasks, read from the released files or made at a length."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common.errors import UserError
from experiments.common.options import OptionalInt, OptionalPath, all_different, at_least
from experiments.common.session import tokens_of
from experiments.evaluation.options import Evaluation
from experiments.evaluation.run import add_costs, add_first, add_methods, evaluate, make_room, means
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft, Score
from experiments.infinitebench.build import sample_maker
from experiments.infinitebench.metrics import score
from experiments.infinitebench.read import Released, check_file, read_sample
from experiments.infinitebench.tasks import MAX_NEW_TOKENS, SYNTHETIC, Task, sample_name
from models import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniteBench(Evaluation):
    """InfiniteBench: questions about texts of 100,000 tokens and more, each with its own metric."""

    tasks: tuple[Task, ...] = SYNTHETIC
    """Tasks; if not given, the four whose samples can be made at any length."""
    data: OptionalPath = None
    """Folder of the released files (passkey.jsonl and so on). Tasks without a file there are made,
    if they can be."""
    length: OptionalInt = None
    """Tokens of prompt and answer: of samples that are made, and at most of those that are read,
    whose middle is left out; the model's context if not given."""
    samples: int = 20
    """Samples of each task that is made; of a file, all (or --limit) are read."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least("length", self.length, 1)
        at_least("samples", self.samples, 1)
        all_different("tasks", self.tasks)
        for task in self.tasks:
            if self.length is not None and self.length <= MAX_NEW_TOKENS[task]:
                raise UserError(_too_short(task, f"--length {self.length}"))

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        console = Console()
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"--data: there is no folder {self.data}; check the path")
        files = {task: self._file(task) for task in self.tasks}
        for task, file in files.items():
            if file is None and self.data is not None:
                console.print(f"made: {task}, {self.data} holds no {task}.jsonl", soft_wrap=True)
        sources = {
            f"{task}_sha256": "made" if file is None else file.sha256
            for task, file in files.items()
        }
        scores = evaluate(
            self,
            settings=sources,
            drafts=functools.partial(
                drafts, files=files, length=self.length, samples=self.samples, seed=self.seed,
                chat=self.chat,
            ),
            metric=metric,
        )  # fmt: skip
        make_room(console, len(scores))
        console.print(task_table(scores, title=Path(self.model.model).name))
        console.print(f"written: {self.folder / 'record.jsonl'}", soft_wrap=True)

    def _file(self, task: Task) -> Released | None:
        """The task's released file; None if its samples are to be made."""
        path = None if self.data is None else self.data / f"{task}.jsonl"
        if task in SYNTHETIC and (path is None or not path.is_file()):
            return None
        if path is None:
            raise UserError(
                f"{task} cannot be made: name the folder that holds {task}.jsonl of the data set "
                "xinrongzhang2022/InfiniteBench with --data, or leave the task out"
            )
        return check_file(path, task, self.limit)


def drafts(
    model: Model,
    *,
    files: Mapping[Task, Released | None],
    length: int | None,
    samples: int,
    seed: int,
    chat: bool,
) -> list[Draft]:
    """Returns samples before they are made or read, task by task.

    Args:
        model: the model.
        files: of the tasks wanted, None for those whose samples are made.
        length: tokens of prompt and answer, the model's context if None.
        samples: of each task that is made.
        seed: decides everything random in them.
        chat: prompts will be put into the chat template.

    Raises:
        UserError: the model's context is too short for the answers of a task.
    """
    if length is None:
        length = model.config.max_position
        for task in files:
            if length <= MAX_NEW_TOKENS[task]:
                raise UserError(_too_short(task, f"the model's context of {length}"))

    def count_tokens(prompt: str, lead: str) -> int:
        return len(tokens_of(model, prompt, chat=chat, lead=lead))

    def maker(task: Task, file: Released | None) -> Callable[[int], Sample]:
        if file is None:
            return sample_maker(task, count_tokens, length, samples, seed)
        return functools.partial(
            read_sample, file, tokenizer=model.tokenizer, count_tokens=count_tokens, length=length
        )

    return [
        Draft(sample_name(task, length, place), task, length, functools.partial(make, place))
        for task, file in files.items()
        for make in [maker(task, file)]
        for place in range(samples if file is None else len(file.starts))
    ]


def metric(sample: Sample, answer: str) -> float:
    """Returns the score of an answer, from 0 to 1, by the metric of its task."""
    return score(sample.task, answer, sample.answers)


def task_table(scores: Mapping[str, Sequence[Score]], *, title: str) -> Table:
    """Returns mean scores in percent: tasks down, methods across, averages and costs below."""
    columns = {label: means(found) for label, found in scores.items()}
    table = Table(title=title)
    add_first(table)
    add_methods(table, list(columns))
    for row in zip(*columns.values(), strict=True):
        first = row[0]
        table.add_row(
            first.task, f"{first.length:,}", str(first.samples),
            *(f"{100 * mean.score:.1f}" for mean in row),
        )  # fmt: skip
    table.add_section()
    averages = (np.mean([mean.score for mean in column]) for column in columns.values())
    table.add_row("average", "", "", *(f"{100 * value:.1f}" for value in averages))
    add_costs(table, scores)
    return table


def _too_short(task: Task, what: str) -> str:
    return (
        f"answers of {task} take up to {MAX_NEW_TOKENS[task]} tokens, more than {what} holds; ask "
        "for a greater length, or leave the task out"
    )
