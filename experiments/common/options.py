"""Groups of command line options. Field docstrings are the `--help` text."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.common.errors import UserError, check_writable

AttentionName = Literal[
    "dense", "minference", "a_shape", "tri_shape", "vertical_slash", "block_sparse"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model and how it is run."""

    model: str
    """A .gguf file, a Hugging Face or Orbax directory, or a hub id such as org/name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on an accelerator, float32 on a CPU
    (where it is the faster one)."""
    context_length: int | None = None
    """Read prompts beyond the model's own context, up to this many tokens, by dynamic NTK scaling
    of the rotary embedding."""
    chunk_size: int | None = None
    """Read the prompt this many tokens at a time (less memory); all at once if not given."""

    def __post_init__(self) -> None:
        """Raises UserError for sizes below one."""
        for name in ("context_length", "chunk_size"):
            _at_least(name, getattr(self, name), 1)

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The floating type asked for."""
        name = self.dtype
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt: exactly one of the two."""

    prompt: str | None = None
    """The prompt itself."""
    prompt_file: Path | None = None
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
    """Attention while the prompt is read. Budgets left out take the pattern's own default."""

    attention: AttentionName = "minference"
    """dense; minference: each head as --patterns says (without a file: vertical_slash for all heads);
    or one pattern for all heads."""
    patterns: Path | None = None
    """Pattern file for --attention minference: the original project's JSON or this project's own."""
    vertical_size: int | None = None
    """vertical_slash, minference: key columns kept."""
    slash_size: int | None = None
    """vertical_slash, minference: diagonals kept."""
    sink_size: int | None = None
    """First keys that every query sees (all but dense and block_sparse)."""
    window_size: int | None = None
    """Nearest keys that every query sees (all but dense and block_sparse)."""
    num_blocks: int | None = None
    """block_sparse: key blocks kept for each block of queries."""
    last_size: int | None = None
    """tri_shape: last queries that see everything."""

    BUDGETS = ("vertical_size", "slash_size", "sink_size", "window_size", "num_blocks", "last_size")

    def __post_init__(self) -> None:
        """Raises UserError for a budget below zero or one that the attention does not have."""
        for name in self.BUDGETS:
            _at_least(name, getattr(self, name), 0)
        if self.patterns is not None and self.attention != "minference":
            raise UserError(
                f"--patterns belongs to --attention minference, got --attention {self.attention}"
            )
        if self.patterns is not None and self.budgets:
            flags = ", ".join(map(_flag, self.budgets))
            raise UserError(f"--patterns already sets every head's budget; remove {flags}")
        allowed = self._own_budgets()
        for name in self.budgets:
            if name not in allowed:
                have = ", ".join(map(_flag, allowed)) or "no budgets"
                raise UserError(
                    f"{_flag(name)} does not apply to --attention {self.attention}, "
                    f"which has {have}"
                )

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets given on the command line."""
        values = {name: getattr(self, name) for name in self.BUDGETS}
        return {name: value for name, value in values.items() if value is not None}

    def _own_budgets(self) -> tuple[str, ...]:
        match self.attention:
            case "dense":
                return ()
            case "a_shape":
                return ("sink_size", "window_size")
            case "tri_shape":
                return ("sink_size", "window_size", "last_size")
            case "block_sparse":
                return ("num_blocks",)
            case "vertical_slash" | "minference":
                return ("vertical_size", "slash_size", "sink_size", "window_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Tokens generated at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that reach this probability together."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("temperature", self.temperature, 0)
        _at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("--top-k and --top-p need --temperature above 0, got 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is compared, measured, drawn and kept."""

    compare: Literal["dense"] | None = None
    """Also run dense attention, and report how far the next-token distribution moved."""
    repeats: int = 1
    """Timed runs of the prefill; the median is reported."""
    plot: Path | None = None
    """Folder for pictures: density of every layer and head, and one head's visited keys."""
    plot_layer: int | None = None
    """Layer of the head drawn; the middle one if not given."""
    plot_head: int = 0
    """Head drawn."""
    record: Path | None = None
    """JSONL file that a record of the run is appended to."""

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        _at_least("repeats", self.repeats, 1)
        _at_least("plot_layer", self.plot_layer, 0)
        _at_least("plot_head", self.plot_head, 0)

    def check_writable(self) -> None:
        """Raises UserError if a result could not be written at the end; creates missing folders."""
        if self.plot is not None:
            check_writable(self.plot, folder=True)
        if self.record is not None:
            check_writable(self.record, folder=False)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(name: str, value: float | None, least: int) -> None:
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
