"""Options of `minference search`. Field docstrings are the `--help` text."""

import dataclasses
import functools
import hashlib
import platform
from typing import Any, Literal

import minference_jax as mj
from experiments.common.errors import UserError
from experiments.common.options import OptionalFloat, OptionalPath, at_least
from experiments.common.prompts import FROM_BOOK, Prompt, Task, book_of, build_prompt
from minference_jax.files import check_original
from minference_jax.search import FAMILIES, TABLE_7, shipped_space, shipped_space_v2, smallest_share

KindName = Literal["dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse"]
KINDS: dict[KindName, type] = {
    "dense": mj.Dense,
    "a_shape": mj.AShape,
    "tri_shape": mj.TriShape,
    "vertical_slash": mj.VerticalSlash,
    "block_sparse": mj.BlockSparse,
}
_TARGET = 0.25

# Budgets that heads can be given from a common one, as multiples of their mean.
_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The prompts that patterns are compared on."""

    tasks: tuple[Task, ...] = ("key_value",)
    """Retrieval from pairs of random UUIDs (as in the paper), a number hidden in a book (or among
    other such numbers), a book, Python source."""
    text: OptionalPath = None
    """Book of book, needle and multi_needle: a UTF-8 file or a folder of .txt files; if not given,
    a chapter."""
    length: int = 4096
    """Tokens of a prompt; the paper takes 30,000."""
    prompts: int = 1
    """Prompts of each task, made with the seed and the ones after it."""
    seed: int = 0
    """Seed of the first prompt of each task."""
    chat: bool = True
    """Put questions into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, and for a book that would not be read."""
        at_least("length", self.length, 1)
        at_least("prompts", self.prompts, 1)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(
                f"--tasks must name each task once, at least one; got {' '.join(self.tasks)!r}"
            )
        if self.text is not None and FROM_BOOK.isdisjoint(self.tasks):
            _ = self.book  # tells what is wrong

    @functools.cached_property
    def book(self) -> str:
        """The text of the book; raises UserError if it cannot be read."""
        return book_of(self.tasks, self.text)

    @property
    def wanted(self) -> list[tuple[Task, int]]:
        """The task and the seed of each prompt."""
        seeds = range(self.seed, self.seed + self.prompts)
        return [(task, seed) for task in self.tasks for seed in seeds]

    def build(self, task: Task, size: int, seed: int) -> Prompt:
        """Returns a prompt of a number of pairs or words."""
        return build_prompt(task, size, seed=seed, book=self.book)

    def describe(self) -> str:
        """The tasks in words."""
        return " and ".join(self.tasks)

    def settings(self) -> dict[str, Any]:
        """Returns what decides the prompts."""
        text = hashlib.sha256(self.book.encode()).hexdigest()
        python = platform.python_version() if "code" in self.tasks else None
        return dataclasses.asdict(self) | {"text": text if self.book else None, "python": python}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """The candidates, and how the best is chosen."""

    space: Literal["equal_cost", "paper", "shipped", "shipped_v2"] = "equal_cost"
    """All patterns scaled to one cost; the paper's Table 7; those of the released searches."""
    kinds: tuple[KindName, ...] = ()
    """Only these patterns; if not given, all that the space has."""
    objective: Literal["output_error", "recall", "log_recall", "count"] = "output_error"
    """Output's squared error (paper); mass kept (shipped); its logarithm; share off by > 0.005."""
    target: OptionalFloat = None
    """Cost as a share of dense attention's; 0.25 where the space or the budget needs one."""
    measure: Literal["flops", "density"] = "flops"
    """What cost is: key tiles that the kernel executes, or pairs of query and key."""
    budget: Literal["each", "global"] = "each"
    """The target for every head, or for the mean of all heads, spent where it helps most."""
    group: Literal["head", "kv_group"] = "head"
    """Whether heads that share keys and values must share their pattern."""
    first_row: int = 0
    """Queries before this one are not scored (the released search: 2500)."""
    continue_with: Literal["dense", "sparse"] = "dense"
    """What the layers behind see: outputs of dense attention, or of the patterns found."""
    original: bool = False
    """Also write the patterns as one of MInference's own JSON files."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, and options that exclude each other."""
        at_least("first_row", self.first_row, 0)
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"--target must be above 0 and at most 1, got {self.target}")
        if self.target is not None and not self.limited:
            raise UserError(
                "--target needs --space equal_cost or --budget global: in the other spaces "
                "candidates have the cost they have"
            )
        if self.budget == "global" and self.continue_with == "sparse":
            raise UserError(
                "--continue-with sparse needs --budget each: a common budget is only spent once "
                "all layers are scored"
            )

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what a head, or all heads, may cost."""
        return self.space == "equal_cost" or self.budget == "global"

    @property
    def at_most(self) -> float | None:
        """That limit."""
        return (self.target or _TARGET) if self.limited else None

    def check(self, length: int) -> None:
        """Raises UserError where no pattern can be found for prompts of this length."""
        if self.first_row >= length:
            raise UserError(f"--first-row must be below --length {length}, got {self.first_row}")
        candidates, _ = self.candidates(length)
        if self.original:
            for pattern in candidates:
                self._check_original(pattern)
        if self.space == "equal_cost":
            least = smallest_share(candidates, length, measure=self.measure)
            if (self.at_most or 1.0) < least:
                raise UserError(
                    f"--target {self.at_most} cannot be met: with {length} tokens, the smallest "
                    f"budgets execute {least:.3f} of dense attention; raise --target or --length"
                )

    def _check_original(self, pattern: mj.Pattern) -> None:
        if self.space == "equal_cost" and isinstance(pattern, mj.BlockSparse):
            pattern = mj.BlockSparse(num_blocks=1)  # its budget is not known yet
        try:
            check_original(pattern)
        except ValueError as error:
            raise UserError(
                f"{error}; with --original take --space paper, or --kinds a_shape vertical_slash"
            ) from error

    def candidates(self, length: int) -> tuple[list[mj.Pattern], list[float] | None]:
        """Returns the candidates, and the costs that their budgets are fitted to, if they are.

        Raises:
            UserError: the space has no pattern of the kinds asked for.
        """
        spaces = {
            "equal_cost": FAMILIES,
            "paper": TABLE_7,
            "shipped": shipped_space(length),
            "shipped_v2": shipped_space_v2(),
        }
        space = [*spaces[self.space]]
        if self.budget == "global" and mj.Dense() not in space:
            space.append(mj.Dense())
        if self.kinds:
            space = [p for p in space if type(p) in {KINDS[kind] for kind in self.kinds}]
        if self.space == "equal_cost" and self.budget == "each":
            space = [p for p in space if p != mj.Dense()]  # it never costs less
        if not space:
            raise UserError(
                f"--space {self.space} has no pattern of --kinds {' '.join(self.kinds)}"
            )
        if self.space != "equal_cost":
            return space, None
        if self.budget == "each":
            return space, [self.target or _TARGET] * len(space)
        levels = [level * (self.target or _TARGET) for level in _LEVELS]
        grid = [(p, level) for level in levels for p in space if level < 1 and p != mj.Dense()]
        grid += [(p, 1.0) for p in space if p == mj.Dense()]
        return [p for p, _ in grid], [level for _, level in grid]

    def settings(self) -> dict[str, Any]:
        """Returns what decides the scores; the choice can be made again from the same scores."""
        chosen = {"original"} | ({"objective"} if self.continue_with == "dense" else set())
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in chosen}
