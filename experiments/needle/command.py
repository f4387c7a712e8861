"""`minference needle`: is a number found wherever it lies in a long text?"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common.methods import slug
from experiments.common.options import OptionalPath, all_different, at_least
from experiments.common.prompts import book_of
from experiments.evaluation.options import Evaluation
from experiments.evaluation.run import evaluate, make_room, table
from experiments.evaluation.stages import Score
from experiments.needle.plot import grid_picture
from experiments.needle.samples import MAX_NEW_TOKENS, drafts, holds_answer, sample_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Evaluation):
    """Find a needle in a haystack: a city's number, at many depths of texts of many lengths."""

    text: OptionalPath = None
    """Book of the haystacks: a UTF-8 file or a folder of .txt files; if not given, a chapter."""
    lengths: tuple[int, ...] = (1000, 2000, 3000, 4000)
    """Tokens of prompt and answer. The paper takes 15 lengths, evenly from 1,000 to 1,000,000."""
    depths: int = 10
    """Depths of the needle, evenly from 0 to 100 %."""
    rounds: int = 1
    """Samples of each length and depth; the paper takes 5."""
    lead: bool = False
    """Read "The special magic … number is:" with the prompt, so that this attention must find the
    number. Without it, as in the paper, a model that repeats the question finds it while it
    decodes, densely."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least("depths", self.depths, 1)
        at_least("rounds", self.rounds, 1)
        all_different("lengths", self.lengths)
        at_least("lengths", min(self.lengths), 2 * MAX_NEW_TOKENS)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        console = Console()
        book = book_of(["needle"], self.text)
        depths = np.round(np.linspace(0, 100, self.depths), 2).tolist()
        lengths = sorted(self.lengths)
        scores = evaluate(
            self,
            settings={"text_sha256": hashlib.sha256(book.encode()).hexdigest()},
            drafts=functools.partial(
                drafts, book=book, lengths=lengths, depths=depths, rounds=self.rounds,
                seed=self.seed, chat=self.chat, lead=self.lead,
            ),
            metric=holds_answer,
        )  # fmt: skip
        make_room(console, len(scores))
        console.print(table(scores, title=f"needles found by {Path(self.model.model).name}"))
        pictures = [
            self._draw(label, of_method, lengths, depths) for label, of_method in scores.items()
        ]
        for path in (*pictures, self.folder / "record.jsonl"):
            console.print(f"written: {path}", soft_wrap=True)

    def _draw(
        self, label: str, scores: list[Score], lengths: list[int], depths: list[float]
    ) -> Path:
        found = {one.name: one.score for one in scores}
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                names = [sample_name(length, depth, number) for number in range(self.rounds)]
                if cell := [found[name] for name in names if name in found]:
                    grid[row, column] = np.mean(cell)
        right = np.mean([one.score for one in scores])
        title = f"{Path(self.model.model).name}\n{label}: {right:.1%} found"
        path = self.folder / f"needle-{slug(label)}.png"
        return grid_picture(grid, depths=depths, lengths=lengths, title=title, path=path)
