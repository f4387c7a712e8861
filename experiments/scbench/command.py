"""`minference scbench`: does what was kept of a context answer the later questions, too?"""

import dataclasses
import functools
import hashlib
from pathlib import Path

from rich.console import Console

from experiments.common.errors import UserError
from experiments.common.options import OptionalPath, all_different, at_least
from experiments.common.prompts import packaged_chapter, read_book
from experiments.needle.samples import holds_answer
from experiments.scbench.options import Conversing
from experiments.scbench.report import Groups, make_room, turn_table, turns_picture
from experiments.scbench.run import converse
from experiments.scbench.samples import MAX_NEW_TOKENS, TaskName, drafts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCBench(Conversing):
    """Several questions about one context, in the manner of SCBench: scores of each turn."""

    tasks: tuple[TaskName, ...] = ("retr_kv", "needles")
    """retr_kv: values of keys in a JSON object (SCBench's Retr.KV); needles: numbers in a text."""
    lengths: tuple[int, ...] = (4096,)
    """Tokens of a whole conversation of several turns. SCBench's Retr.KV has 125,000."""
    samples: int = 20
    """Conversations of each task and length; SCBench has 100."""
    text: OptionalPath = None
    """What needles are hidden in: a UTF-8 file or a folder of .txt files; if not given, a chapter
    of about 5,400 tokens."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, or options that contradict each other."""
        super().__post_init__()
        at_least("samples", self.samples, 1)
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            all_different(name, values)
        at_least("lengths", min(self.lengths), 2 * max(MAX_NEW_TOKENS[task] for task in self.tasks))
        if self.text is not None and "needles" not in self.tasks:
            raise UserError(f"--text belongs to --tasks needles, got {' '.join(self.tasks)}")

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        console = Console()
        text = packaged_chapter() if self.text is None else read_book(self.text)
        lengths = sorted(self.lengths)
        scores = converse(
            self,
            settings={"text_sha256": hashlib.sha256(text.encode()).hexdigest()},
            drafts=functools.partial(
                drafts, tasks=self.tasks, lengths=lengths, samples=self.samples, turns=self.turns,
                text=text, seed=self.seed, chat=self.chat,
            ),
            metric=holds_answer,
        )  # fmt: skip
        groups = Groups(tasks=self.tasks, lengths=lengths, turns=self.turns)
        make_room(console, groups)
        for label, modes in scores.items():
            for mode, found in modes.items():
                console.print(turn_table(found, groups, title=f"{label}, {mode}"))
        title = Path(self.model.model).name
        picture = turns_picture(scores, groups, title=title, path=self.folder / "scbench.png")
        for path in (picture, self.folder / "record.jsonl"):
            console.print(f"written: {path}", soft_wrap=True)
