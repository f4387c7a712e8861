"""The candidates of `minference search`, and how the best are chosen.

Field docstrings are the `--help` text.
"""

import dataclasses
from typing import Annotated, Any, Literal, get_args

import jax.numpy as jnp
import tyro

import minference_jax as mj
from experiments.common.errors import UserError
from experiments.common.options import OptionalFloat, at_least
from minference_jax.files import check_original
from minference_jax.search import (
    FAMILIES,
    TABLE_7,
    Objective,
    shipped_space,
    shipped_space_v2,
    smallest_share,
)

KindName = Literal["dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse"]
KINDS: dict[KindName, type] = {
    "dense": mj.Dense,
    "a_shape": mj.AShape,
    "tri_shape": mj.TriShape,
    "vertical_slash": mj.VerticalSlash,
    "block_sparse": mj.BlockSparse,
}
_TARGET = 0.25

# Costs between which a common budget is spent; fixed, so that any target can be chosen afterwards.
_COSTS = (0.03, 0.06, 0.12, 0.25, 0.5)
_ALPHAS = (0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.006)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """The candidates, and how the best is chosen."""

    space: Literal["equal_cost", "threshold", "hybrid", "paper", "shipped", "shipped_v2"] = (
        "equal_cost"
    )
    """All patterns scaled to the same costs; adaptive thresholds, alone or with the columns of the
    last queries; the paper's Table 7; the patterns of the released searches."""
    kinds: tuple[KindName, ...] = ()
    """Only these patterns; if not given, all that the space has."""
    levels: tuple[float, ...] = ()
    """Costs that patterns are scaled to (equal_cost), or thresholds (threshold, hybrid). If not
    given, what the folder's scores have; at first the target, with --budget global also 0.03 0.06
    0.12 0.25 0.5; thresholds 0.4 0.2 0.1 0.05 0.02 0.01."""
    columns: int = 512
    """Columns of hybrid heads."""
    objective: Annotated[
        Objective | None,
        tyro.conf.arg(metavar="{" + ",".join(get_args(Objective)) + "}", help_behavior_hint=""),
    ] = None
    """Output's squared error (paper); what it adds to the residual stream; mass kept (shipped); its
    logarithm; share off by > 0.005. If not given, residual_error; output_error for --space paper,
    shipped, shipped_v2 with --budget each."""
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
        at_least("columns", self.columns, 0)
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"--target must be above 0 and at most 1, got {self.target}")
        if self.target is not None and not self.limited:
            raise UserError(
                f"--target needs --budget global with --space {self.space}: its candidates have "
                "the cost they have"
            )
        if self.levels and self.fixed:
            raise UserError(f"--levels belongs to other spaces than --space {self.space}")
        if any(not 0 < level <= 1 for level in self.levels):
            raise UserError(f"--levels must be above 0 and at most 1, got {_words(self.levels)}")
        if self.kinds and self.adaptive:
            raise UserError(f"--kinds does not apply to --space {self.space}")
        if self.original and self.adaptive:
            raise UserError(f"MInference's files (--original) cannot hold --space {self.space}")
        if self.budget == "global" and self.continue_with == "sparse":
            raise UserError(
                "--continue-with sparse needs --budget each: a common budget is only spent once "
                "all layers are scored"
            )

    @property
    def adaptive(self) -> bool:
        """Whether candidates are thresholds."""
        return self.space in ("threshold", "hybrid")

    @property
    def fixed(self) -> bool:
        """Whether candidates are patterns with the cost they have."""
        return self.space in ("paper", "shipped", "shipped_v2")

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what a head, or all heads, may cost."""
        return not self.fixed or self.budget == "global"

    @property
    def limit(self) -> float:
        """That limit, where there is one."""
        return self.target or _TARGET

    @property
    def compared_by(self) -> Objective:
        """The objective."""
        own = "output_error" if self.fixed and self.budget == "each" else "residual_error"
        return self.objective or own

    def settled(self, length: int, scored: list[float] | None) -> "SpaceOptions":
        """Returns the options with the levels that are given, scored already, or the default.

        Args:
            length: tokens of a prompt.
            scored: the levels of the scores that the folder holds, if it does.

        Raises:
            UserError: no candidate, or no pattern, can be found with these options.
        """
        levels = self.levels or tuple(scored or ())
        if not levels and self.adaptive:
            levels = _ALPHAS
        elif not levels and self.space == "equal_cost":
            common = _COSTS if self.budget == "global" else ()
            least = self._least(length)
            levels = (*(cost for cost in common if cost >= least), self.limit)
        levels = tuple(sorted({*levels}, reverse=self.adaptive))
        settled = dataclasses.replace(self, levels=levels)
        settled.check(length)
        return settled

    def check(self, length: int) -> None:
        """Raises UserError where no pattern can be found for prompts of this length."""
        if self.first_row >= length:
            raise UserError(f"--first-row must be below --length {length}, got {self.first_row}")
        if self.original:
            for pattern in self._patterns(length):
                self._check_original(pattern)
        if self.space != "equal_cost":
            return
        least = self._least(length)
        for flag, costs in (("target", (self.limit,)), ("levels", self.levels)):
            if min(costs) < least:
                raise UserError(
                    f"--{flag} {_words(costs)} cannot be met: with {length} tokens, the smallest "
                    f"budgets execute {least:.3f} of dense attention; raise --{flag} or --length"
                )
        if self.budget == "each" and self.limit not in self.levels:
            raise UserError(
                f"--target {self.limit:g} must be one of --levels {_words(self.levels)}, because "
                "--budget each gives every head that cost; another --output takes other levels"
            )
        if self.budget == "global" and len(self.levels) == 1:
            raise UserError(
                "--budget global chooses between costs, but there is only one of them, "
                f"{_words(self.levels)}; give several --levels, and another --output if this one "
                "holds a search"
            )

    def _least(self, length: int) -> float:
        return smallest_share(self._patterns(length), length, measure=self.measure)

    def _check_original(self, pattern: mj.Pattern) -> None:
        if self.space == "equal_cost" and isinstance(pattern, mj.BlockSparse):
            pattern = mj.BlockSparse(num_blocks=1)  # its budget is not known yet
        try:
            check_original(pattern)
        except ValueError as error:
            raise UserError(
                f"{error}; with --original take --space paper, or --kinds a_shape vertical_slash"
            ) from error

    def _patterns(self, length: int) -> list[mj.Pattern]:
        """The patterns of the space but dense, whose scores are known."""
        spaces = {
            "equal_cost": FAMILIES,
            "paper": TABLE_7,
            "shipped": shipped_space(length),
            "shipped_v2": shipped_space_v2(),
        }
        wanted = {KINDS[kind] for kind in self.kinds or KINDS}
        found = [p for p in spaces[self.space] if type(p) in wanted and p != mj.Dense()]
        if not found:
            raise UserError(
                f"--space {self.space} has no pattern of --kinds {' '.join(self.kinds)} beside "
                "dense"
            )
        return found

    @property
    def dense(self) -> bool:
        """Whether dense attention is among what a common budget is spent on."""
        return not self.kinds or "dense" in self.kinds

    def candidates(self, length: int) -> tuple[list[mj.Pattern], list[float] | None]:
        """Returns the patterns, and the costs that their budgets are fitted to, if they are."""
        patterns = self._patterns(length)
        if self.fixed:
            return patterns, None
        grid = [(pattern, level) for level in self.levels for pattern in patterns]
        return [pattern for pattern, _ in grid], [level for _, level in grid]

    def attention(self) -> mj.AdaptiveAttention:
        """Returns the thresholds of an adaptive space, as arrays [candidates, 1]."""
        blocks = mj.BlockThreshold(jnp.asarray(self.levels, jnp.float32)[:, None])
        if self.space == "threshold":
            return mj.AdaptiveAttention(blocks)
        return mj.AdaptiveAttention(mj.WithColumns(blocks, self.columns))

    def settings(self) -> dict[str, Any]:
        """Returns what decides the scores; the choice can be made again from the same scores."""
        chosen = {"original"}
        if self.continue_with == "dense":
            chosen |= {"objective", "target", "budget"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in chosen}


def _words(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
