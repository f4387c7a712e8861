"""The attention that the command line asks for."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

import minference_jax as mj
from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.options import OptionalInt, flag
from minference_jax.files import attention_size
from minference_jax.recommended import ALPHA, NUM_COLUMNS
from models import Model

AttentionName = Literal[
    "dense", "minference", "a_shape", "tri_shape", "vertical_slash", "block_sparse"
]

# Budgets where the command line names none: those of the original project.
VERTICAL_SLASH = mj.VerticalSlash(vertical_size=1000, slash_size=6096)
DEFAULTS: dict[AttentionName, mj.Pattern] = {
    "dense": mj.Dense(),
    "minference": VERTICAL_SLASH,
    "a_shape": mj.AShape(sink_size=128, window_size=1024),
    "tri_shape": mj.TriShape(sink_size=128, window_size=3968, last_size=100),
    "vertical_slash": VERTICAL_SLASH,
    "block_sparse": mj.BlockSparse(num_blocks=100),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention while the prompt is read.

    Budgets left out take the pattern's default, in brackets. With `minference` and one of the
    budgets of vertical_slash, every head has that pattern.
    """

    attention: AttentionName = "minference"
    """One pattern for all heads; minference: each head's own, as --patterns says, or without it
    blocks and columns that are found for each prompt: by thresholds that were searched for this
    very model, if such are shipped, or else by the same for all heads."""
    patterns: Annotated[
        str | None, tyro.conf.arg(metavar="NAME_OR_FILE", help_behavior_hint="")
    ] = None
    """Patterns for minference: the name of shipped ones, or a file (this project's own format, or
    the original project's JSON)."""
    vertical_size: OptionalInt = None
    """Key columns kept (vertical_slash, minference: 1000)."""
    slash_size: OptionalInt = None
    """Diagonals kept (vertical_slash, minference: 6096)."""
    sink_size: OptionalInt = None
    """First keys every query sees (a_shape, tri_shape: 128; otherwise 30)."""
    window_size: OptionalInt = None
    """Nearest keys every query sees (a_shape: 1024, tri_shape: 3968; otherwise 100)."""
    num_blocks: OptionalInt = None
    """Blocks of 64 keys kept for each block of queries (block_sparse: 100)."""
    last_size: OptionalInt = None
    """Last queries that see everything (tri_shape: 100)."""

    def __post_init__(self) -> None:
        """Raises UserError for a budget that the attention does not have or cannot take."""
        if self.patterns is not None and self.attention != "minference":
            raise UserError(
                f"--patterns belongs to --attention minference, got --attention {self.attention}"
            )
        if self.patterns is not None and self.budgets:
            flags = ", ".join(map(flag, self.budgets))
            raise UserError(f"--patterns already sets every head's budget; remove {flags}")
        own = [field.name for field in dataclasses.fields(DEFAULTS[self.attention])]
        for name in self.budgets:
            if name not in own:
                have = ", ".join(map(flag, own)) or "no budgets"
                raise UserError(
                    f"{flag(name)} does not apply to --attention {self.attention}, which has {have}"
                )
        self.uniform_pattern()

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets given on the command line."""
        names = ("vertical_size", "slash_size", "sink_size", "window_size", "num_blocks")
        values = {name: getattr(self, name) for name in (*names, "last_size")}
        return {name: value for name, value in values.items() if value is not None}

    def uniform_pattern(self) -> mj.Pattern:
        """Returns the pattern of every head; raises UserError for a budget out of range."""
        with reported_as_user_error(ValueError, TypeError):
            return dataclasses.replace(DEFAULTS[self.attention], **self.budgets)

    def check_readable(self) -> None:
        """Raises UserError if there are no such patterns; before a model is loaded for them."""
        if self.patterns is not None:
            read_attention(self.patterns)

    def for_model(self, model: Model, console: Console) -> "AttentionOptions":
        """Returns these options with what is shipped for a model, if they name nothing; says so."""
        if not self._adaptive:
            return self
        others = "--patterns or --attention choose otherwise"
        console.print(explain_default(model, others=others), highlight=False, soft_wrap=True)
        return dataclasses.replace(self, patterns=shipped_for(model))

    def build(self, *, num_layers: int, num_heads: int) -> Any:
        """Returns the attention of a model of this size.

        Raises:
            UserError: the patterns cannot be read, or are for other layers or heads.
        """
        if self.attention == "dense":
            return mj.DenseAttention()
        if self.patterns is not None:
            attention = read_attention(self.patterns)
            check_size(attention, self.patterns, num_layers=num_layers, num_heads=num_heads)
            return attention
        if self._adaptive:
            return mj.recommended_attention(num_layers)
        pattern = self.uniform_pattern()
        return mj.SparseAttention(
            mj.HeadPatterns.uniform(pattern, num_layers=num_layers, num_heads=num_heads)
        )

    @property
    def _adaptive(self) -> bool:
        return self.attention == "minference" and self.patterns is None and not self.budgets

    def describe(self) -> str:
        """Returns the attention in words: the name, and the budgets or the file."""
        if self.attention == "dense":
            return "dense"
        if self.patterns is not None:
            return f"minference, patterns of {Path(self.patterns).name}"
        if self._adaptive:
            budget = f"alpha={ALPHA}, num_columns={NUM_COLUMNS}"
            return f"minference without patterns: adaptive, found for each prompt ({budget})"
        sizes = dataclasses.asdict(self.uniform_pattern())
        budget = ", ".join(f"{name}={value}" for name, value in sizes.items())
        if self.attention == "minference":
            return f"minference without patterns: vertical_slash for every head ({budget})"
        return f"{self.attention} ({budget})"


def shipped_for(model: Model) -> str | None:
    """Returns the name of the shipped patterns that are recommended for a model, if there are."""
    return mj.recommended_patterns(model.config.num_layers, model.config.num_heads, model.name)


def explain_default(model: Model, *, others: str) -> str:
    """Returns in a line what `minference` without patterns is for a model, why, and what else.

    Args:
        model: the model.
        others: how a command chooses something else.
    """
    shipped, name = shipped_for(model), model.name or "without a name"
    if shipped is None:
        return (
            f"minference: no search is shipped for the model {name}, so alpha={ALPHA} and "
            f"{NUM_COLUMNS} columns for every head; {others}, `minference search` finds patterns"
        )
    return f"minference: {shipped}, found by a search for the model {name}; {others}"


def read_attention(name: str) -> mj.SparseAttention | mj.AdaptiveAttention:
    """Returns the attention that is shipped under a name, or else that of a file.

    Raises:
        UserError: there is none, or the file holds neither patterns nor thresholds.
    """
    shipped = mj.shipped_patterns()
    if name not in shipped and not Path(name).is_file():
        raise UserError(
            f"no pattern file at {name}, and none of this name is shipped; "
            f"shipped are: {', '.join(shipped) or 'none'}"
        )
    with reported_as_user_error(OSError, ValueError):
        return mj.load_shipped(name) if name in shipped else mj.load_attention(name)


def check_size(
    attention: mj.SparseAttention | mj.AdaptiveAttention,
    name: str,
    *,
    num_layers: int,
    num_heads: int,
) -> None:
    """Raises UserError unless an attention that was read is for a model of this size."""
    layers, heads = attention_size(attention)
    if (layers, heads) != (num_layers, num_heads):
        raise UserError(
            f"{name} describes {layers} layers of {heads} heads, but the model has {num_layers} "
            f"layers of {num_heads} heads; use one made for this model"
        )
