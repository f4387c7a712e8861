"""Groups of command line options. Field docstrings are the `--help` text."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

import minference_jax as mj
from experiments.common.errors import UserError, check_writable, reported_as_user_error

AttentionName = Literal[
    "dense", "minference", "a_shape", "tri_shape", "vertical_slash", "block_sparse"
]

# Options that may be left out, without the `None` that tyro would show as a choice.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]

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
class LoadOptions:
    """The model and how it is loaded."""

    model: str
    """A .gguf file, a Hugging Face or Orbax directory, or a hub id such as org/name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto: float32 on a CPU, bfloat16 elsewhere."""
    tokenizer: OptionalPath = None
    """Directory with the tokenizer.json to use instead of the model's own tokenizer."""
    rope_scaling: OptionalText = None
    """KIND:FACTOR (linear, dynamic or yarn) stretches the context, for example yarn:4."""

    def __post_init__(self) -> None:
        """Raises UserError for a scaling that is none."""
        _ = self.scaling

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The RoPE scaling asked for, as a model's `config.json` would write it."""
        if self.rope_scaling is None:
            return None
        kind, _, factor = self.rope_scaling.partition(":")
        if kind in ("linear", "dynamic", "yarn"):
            with contextlib.suppress(ValueError):
                return {"rope_type": kind, "factor": float(factor)}
        raise UserError(
            "--rope-scaling must be linear:FACTOR, dynamic:FACTOR or yarn:FACTOR, "
            f"got {self.rope_scaling}"
        )

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The floating type asked for."""
        name = self.dtype
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """The model and how it is run."""

    chunk_size: OptionalInt = None
    """Tokens read at a time (fewer need less memory); the whole prompt if not given."""

    def __post_init__(self) -> None:
        """Raises UserError for a size below one, or a scaling that is none."""
        super().__post_init__()
        at_least("chunk_size", self.chunk_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt: exactly one of the two."""

    prompt: OptionalText = None
    """The prompt itself."""
    prompt_file: OptionalPath = None
    """A UTF-8 text file with the prompt."""
    chat: bool = True
    """Put the prompt into the model's chat template, if it has one, as the user's message."""

    def __post_init__(self) -> None:
        """Raises UserError unless exactly one of `prompt` and `prompt_file` is given."""
        if (self.prompt is None) == (self.prompt_file is None):
            given = "both" if self.prompt is not None else "neither"
            raise UserError(f"expected one of --prompt and --prompt-file, got {given}")

    def read(self) -> str:
        """Returns the prompt's text; raises UserError if it cannot be read or is empty."""
        if self.prompt_file is None:
            text, origin = self.prompt or "", "--prompt"
        else:
            text, origin = _read_text(self.prompt_file), str(self.prompt_file)
        if not text.strip():
            raise UserError(f"the prompt is empty ({origin}); give at least one word")
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention while the prompt is read.

    Budgets left out take the pattern's default, in brackets. The attention `minference` without a
    pattern file gives every head the vertical_slash pattern.
    """

    attention: AttentionName = "minference"
    """One pattern for all heads; minference: each head's own, as --patterns says."""
    patterns: OptionalPath = None
    """Pattern file for minference: the original project's JSON, or this project's own format."""
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
            flags = ", ".join(map(_flag, self.budgets))
            raise UserError(f"--patterns already sets every head's budget; remove {flags}")
        own = [field.name for field in dataclasses.fields(DEFAULTS[self.attention])]
        for name in self.budgets:
            if name not in own:
                have = ", ".join(map(_flag, own)) or "no budgets"
                raise UserError(
                    f"{_flag(name)} does not apply to --attention {self.attention}, "
                    f"which has {have}"
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
        """Raises UserError if the pattern file is not one; before a model is loaded for it."""
        if self.patterns is not None:
            self.load_patterns()

    def load_patterns(self) -> mj.HeadPatterns:
        """Returns the patterns of the file named; raises UserError if it is not one."""
        if self.patterns is None:
            raise UserError("no pattern file was named; give one with --patterns")
        with reported_as_user_error(OSError, ValueError):
            return mj.HeadPatterns.load(self.patterns)

    def head_patterns(self, *, num_layers: int, num_heads: int) -> mj.HeadPatterns:
        """Returns the pattern of each head of a model of this size.

        Raises:
            UserError: the pattern file cannot be read, or is for other layers or heads.
        """
        if self.patterns is None:
            pattern = self.uniform_pattern()
            return mj.HeadPatterns.uniform(pattern, num_layers=num_layers, num_heads=num_heads)
        patterns = self.load_patterns()
        if (patterns.num_layers, patterns.num_heads) != (num_layers, num_heads):
            raise UserError(
                f"{self.patterns} describes {patterns.num_layers} layers of {patterns.num_heads} "
                f"heads, but the model has {num_layers} layers of {num_heads} heads; "
                "use a pattern file made for this model"
            )
        return patterns

    def describe(self) -> str:
        """Returns the attention in words: the name, and the budgets or the file."""
        if self.attention == "dense":
            return "dense"
        if self.patterns is not None:
            return f"minference, patterns of {self.patterns.name}"
        sizes = dataclasses.asdict(self.uniform_pattern())
        budget = ", ".join(f"{name}={value}" for name, value in sizes.items())
        if self.attention == "minference":
            return f"minference without a pattern file: vertical_slash for every head ({budget})"
        return f"{self.attention} ({budget})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Tokens generated at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_k: OptionalInt = None
    """Draw among this many likeliest tokens."""
    top_p: OptionalFloat = None
    """Draw among the likeliest tokens that reach this probability together."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("--top-k and --top-p need --temperature above 0, got 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is compared, measured, drawn and kept."""

    compare: Annotated[
        Literal["dense"] | None, tyro.conf.arg(metavar="dense", help_behavior_hint="")
    ] = None
    """Also run dense attention, and report how far the next-token distribution moved."""
    repeats: int = 1
    """Timed runs of the prefill; the median is reported."""
    plot: OptionalPath = None
    """Folder for pictures: density of every layer and head, and one head's visited keys."""
    plot_layer: OptionalInt = None
    """Layer of the head drawn; the middle one if not given."""
    plot_head: int = 0
    """Head drawn."""
    record: OptionalPath = None
    """JSONL file that a record of the run is appended to."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        at_least("repeats", self.repeats, 1)
        at_least("plot_layer", self.plot_layer, 0)
        at_least("plot_head", self.plot_head, 0)

    def check_writable(self) -> None:
        """Raises UserError if a result could not be written at the end; creates missing folders."""
        if self.plot is not None:
            check_writable(self.plot, folder=True)
        if self.record is not None:
            check_writable(self.record, folder=False)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def at_least(name: str, value: int | float | None, least: int) -> None:
    """Raises UserError for an option below its least value; None is an option left out."""
    if value is not None and value < least:
        raise UserError(f"{_flag(name)} must be at least {least}, got {value}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no prompt file {path}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
