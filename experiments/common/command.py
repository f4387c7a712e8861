"""What the commands that run one prompt share: their options, and the way from prompt to report."""

import dataclasses
import hashlib
import sys
from typing import cast

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int
from rich.console import Console

import minference_jax as mj
from experiments.common.attention import AttentionOptions
from experiments.common.compare import Task, check_drawn_head, draw, run_outcomes
from experiments.common.devices import DeviceOptions, check_spread, is_first
from experiments.common.errors import UserError
from experiments.common.kv_cache import CacheOptions
from experiments.common.memory import check_room, show_estimate
from experiments.common.options import (
    ModelOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
)
from experiments.common.record import append_record
from experiments.common.report import Outcome, show
from experiments.common.session import encode, load, sketch
from models import Model
from models.common.cache import kept_tokens
from models.common.memory import PrefillMemory, device_memory, estimate_prefill, gib

_RECORDED_CHARACTERS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCommand:
    """A command that runs one prompt."""

    model: ModelOptions
    prompt: PromptOptions
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    output: OutputOptions = dataclasses.field(default_factory=OutputOptions)
    devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)


def run_prompt(
    config: PromptCommand,
    *,
    kind: str,
    sampling: SamplingOptions | None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008, immutable
) -> list[Outcome]:
    """Runs a prompt under the attention asked for, reports it, and returns the outcomes.

    Args:
        config: the options.
        kind: name of the command, for the record.
        sampling: how to generate after the prompt, or None to only read it.
        cache: what is kept of the prompt; a comparison with dense attention keeps everything.

    Raises:
        UserError: an input cannot be used, or an output not be written.
    """
    _check_options(config, cache)
    mesh, first = config.devices.build(), is_first()
    progress, console = Console(stderr=True, quiet=not first), Console(quiet=not first)
    text = config.prompt.read()
    if first:
        config.output.check_writable()
    config.attention.check_readable()
    tokens, limit = None, device_memory()
    if limit is not None or mesh is not None:
        memory, tokens = _plan(config, sampling, cache, mesh)
        check_room(memory, limit)
        if limit is not None:
            progress.print(f"memory: about {gib(memory.peak)} of {gib(limit)} GiB", highlight=False)
    model = load(config.model, progress, mesh)
    config = dataclasses.replace(config, attention=config.attention.for_model(model, progress))
    attention = config.attention.build(
        num_layers=model.config.num_layers, num_heads=model.config.num_heads
    )
    check_drawn_head(config.output, model)
    if tokens is None:
        tokens = _encode(model, config.prompt, sampling)
    task = Task(
        model=model,
        tokens=tokens,
        sampling=sampling,
        chunk_size=config.model.chunk_size,
        repeats=config.output.repeats,
        keep_index=config.output.plot is not None,
        cache=cache,
        mesh=mesh,
    )
    outcomes = run_outcomes(
        task,
        config.attention,
        attention=attention,
        compare=config.output.compare is not None,
        console=progress,
    )
    length = tokens.shape[1]
    show(console, prompt_tokens=length, outcomes=outcomes)
    if not first:
        return outcomes
    for path in draw(outcomes[0], output=config.output, length=length):
        console.print(f"picture: {path}")
    if config.output.record is not None:
        append_record(
            config.output.record,
            kind=kind,
            argv=sys.argv,
            config=dataclasses.replace(config, prompt=_shortened(config.prompt)),
            result={
                "prompt_tokens": length,
                "prompt_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "outcomes": [outcome.figures() for outcome in outcomes],
            },
        )
        console.print(f"record: {config.output.record}")
    return outcomes


def show_plan(config: PromptCommand, *, cache: CacheOptions) -> None:
    """Prints the memory that reading the prompt would need; raises UserError if it does not fit."""
    _check_options(config, cache)
    memory, tokens = _plan(config, None, cache, config.devices.imagined())
    limit = device_memory()
    show_estimate(
        Console(quiet=not is_first()),
        memory,
        length=tokens.shape[1],
        limit=limit,
        mesh=config.devices.mesh,
    )
    check_room(memory, limit)


def _check_options(config: PromptCommand, cache: CacheOptions) -> None:
    if config.devices.mesh is not None and config.output.plot is not None:
        raise UserError("--plot needs the index of one device; leave out --mesh")
    if config.devices.sizes[1] > 1 and config.model.chunk_size is not None:
        raise UserError("--mesh with cp splits whole prompts; leave out --chunk-size, or take tp")
    if cache.kv_cache is not None and config.model.chunk_size is not None:
        raise UserError("--kv-cache needs the whole prompt at once; leave out --chunk-size")


def _plan(
    config: PromptCommand,
    sampling: SamplingOptions | None,
    cache: CacheOptions,
    mesh: Mesh | AbstractMesh | None,
) -> tuple[PrefillMemory, Int[np.ndarray, "1 length"]]:
    """Memory of the run that needs most, and the prompt's tokens; loads no weights."""
    model = sketch(config.model)
    tokens = _encode(model, config.prompt, sampling)
    layers, length = model.config.num_layers, tokens.shape[1]
    options = config.attention.for_model(model, Console(quiet=True))  # told once the model is there
    asked = options.build(num_layers=layers, num_heads=model.config.num_heads)
    runs = [(asked, cache.build(num_layers=layers))]
    if config.output.compare is not None:
        runs.append((mj.DenseAttention(), None))
    if mesh is not None:
        of_devices = cast(Mesh, mesh)
        runs = [(mj.ShardedAttention(attention, of_devices), kept) for attention, kept in runs]
    for attention, _ in runs:
        check_spread(model, attention)
    estimates = [
        estimate_prefill(
            model.params, config=model.config, attention_fn=attention, batch=1, length=length,
            new_tokens=_room(sampling) if kept_tokens(compression, length) else 0,
            chunk_size=config.model.chunk_size, compression=compression,
        )
        for attention, compression in runs
    ]  # fmt: skip
    return max(estimates, key=lambda memory: memory.peak), tokens


def _encode(
    model: Model, prompt: PromptOptions, sampling: SamplingOptions | None
) -> Int[np.ndarray, "1 length"]:
    return encode(model, prompt.read(), chat=prompt.chat, max_new_tokens=_room(sampling))


def _room(sampling: SamplingOptions | None) -> int:
    return 1 if sampling is None else sampling.max_new_tokens


def _shortened(prompt: PromptOptions) -> PromptOptions:
    """Returns the options with the beginning of a long prompt: a record names it by its hash."""
    if prompt.prompt is None or len(prompt.prompt) <= _RECORDED_CHARACTERS:
        return prompt
    return dataclasses.replace(prompt, prompt=prompt.prompt[:_RECORDED_CHARACTERS] + " …")
