"""One prompt under one attention, and under dense attention beside it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from rich.console import Console

import minference_jax as mj
from experiments.common.attention import AttentionOptions
from experiments.common.errors import UserError
from experiments.common.kv_cache import CacheOptions
from experiments.common.measure import agreement
from experiments.common.options import OutputOptions, SamplingOptions
from experiments.common.plotting import density_picture, mask_picture
from experiments.common.report import Outcome
from experiments.common.session import run_decode, run_prefill, visited_mask
from models import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is run under each attention.

    Attributes:
        model: the model.
        tokens: the prompt.
        sampling: how to generate after the prompt, or None to only read it.
        chunk_size: tokens read at a time, all if None.
        repeats: timed runs of the prefill.
        keep_index: also keep what the attention asked for visited, to draw it.
        cache: what is kept of the prompt.
        mesh: the devices that the model is on, None for one.
    """

    model: Model
    tokens: Int[np.ndarray, "1 length"]
    sampling: SamplingOptions | None
    chunk_size: int | None
    repeats: int
    keep_index: bool
    cache: CacheOptions
    mesh: Mesh | None


def check_drawn_head(output: OutputOptions, model: Model) -> None:
    """Raises UserError if the head to be drawn does not exist."""
    for name, value, size in (
        ("layer", output.plot_layer, model.config.num_layers),
        ("head", output.plot_head, model.config.num_heads),
    ):
        if value is not None and value >= size:
            raise UserError(f"--plot-{name} must be below the model's {size}, got {value}")


def run_outcomes(
    task: Task, options: AttentionOptions, *, attention: Any, compare: bool, console: Console
) -> list[Outcome]:
    """Runs the attention asked for, and then dense if `compare`; the former comes first."""
    name, description, kv_cache = options.attention, options.describe(), task.cache.kv_cache
    if kv_cache is not None:
        name, description = f"{name}, {kv_cache}", f"{description}; keys kept: {kv_cache}"
    asked = _outcome(task, attention, name, description, console)
    if not compare or name == "dense":
        return [asked]
    task = dataclasses.replace(task, keep_index=False, cache=CacheOptions())
    dense = _outcome(task, mj.DenseAttention(), "dense", "dense", console)
    agreed = agreement(dense.prefill.logits, asked.prefill.logits)
    return [dataclasses.replace(asked, agreement=agreed), dense]


def _outcome(task: Task, attention: Any, name: str, description: str, console: Console) -> Outcome:
    run = run_prefill(
        task.model,
        task.tokens,
        attention if task.mesh is None else mj.ShardedAttention(attention, task.mesh),
        name=name,
        console=console,
        max_new_tokens=1 if task.sampling is None else task.sampling.max_new_tokens,
        chunk_size=task.chunk_size,
        repeats=task.repeats,
        keep_index=task.keep_index,
        compression=task.cache.build(num_layers=task.model.config.num_layers),
    )
    generation = None
    if task.sampling is not None:
        generation = run_decode(task.model, run, task.sampling, name=name, console=console)
    return Outcome(
        name=name,
        description=description,
        prefill=dataclasses.replace(run, cache=None),  # two caches at once are not needed
        next_token=task.model.tokenizer.decode([int(run.logits.argmax())]),
        generation=generation,
    )


def draw(outcome: Outcome, *, output: OutputOptions, length: int) -> list[Path]:
    """Writes the pictures of a sparse run into the folder asked for; returns their paths."""
    folder = output.plot
    if folder is None:
        return []
    density = outcome.prefill.density
    layer = len(density) // 2 if output.plot_layer is None else output.plot_layer
    head = output.plot_head
    visited = visited_mask(outcome.prefill, layer=layer, head=head, length=length)
    return [
        density_picture(
            density,
            title=f"{outcome.name}, {length:,} tokens: {density.mean():.0%} visited",
            path=folder / "density.png",
        ),
        mask_picture(
            visited,
            title=f"layer {layer}, head {head}: {density[layer, head]:.0%} of the causal pairs",
            path=folder / f"mask_layer{layer}_head{head}.png",
        ),
    ]
