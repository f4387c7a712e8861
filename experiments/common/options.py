"""Groups of command line options. Field docstrings are the `--help` text."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from experiments.common.errors import UserError, check_writable

# Options that may be left out, without the `None` that tyro would show as a choice.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


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


def flag(name: str) -> str:
    """Returns an option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def at_least(name: str, value: int | float | None, least: int) -> None:
    """Raises UserError for an option below its least value; None is an option left out."""
    if value is not None and value < least:
        raise UserError(f"{flag(name)} must be at least {least}, got {value}")


def all_different(name: str, values: Sequence[object]) -> None:
    """Raises UserError for an option that names nothing, or something twice."""
    if not values:
        raise UserError(f"{flag(name)} must name at least one")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{flag(name)} names {value} twice; remove one")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no prompt file {path}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
