"""Compiled programs: as few as there are structures of attention, and all before measuring."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.common.programs import Program
from experiments.common.quality import force_answer, score_positions
from experiments.compare.measure import Subject, count_work, read_arguments, run_read


def compile_all(work: Sequence[tuple[Subject, Any]]) -> None:
    """Compiles all that measuring these prompts with these attentions will run."""
    reading: dict[int, tuple[Subject, Program, Any]] = {}
    for subject, attention in tqdm(work, "tracing", leave=False, disable=None):
        arguments, static = read_arguments(subject, attention, tokens=1)
        read = subject.programs.add(run_read.lower, *arguments, **static)
        reading.setdefault(id(read), (subject, read, arguments))
        _add_figures(subject, *read.outputs)
    for subject, read, arguments in tqdm(reading.values(), "loading", leave=False, disable=None):
        run = subject.programs.ready(read)
        if jax.default_backend() != "cpu":  # the first run also loads a program onto the device
            jax.block_until_ready(run(*arguments))


def _add_figures(subject: Subject, hidden: Any, cache: Any, index: Any) -> None:
    """What counts what was visited; distance from dense attention; the answer if one is asked."""
    add, params, config = subject.programs.add, subject.model.params, subject.model.config
    add(count_work.lower, index, jnp.ones(1, jnp.int32), length=subject.reading.length)
    _, rows, embed = hidden.shape
    part = lambda *shape: jax.ShapeDtypeStruct(shape, hidden.dtype)
    both = part(rows, embed), part(rows, embed)
    add(score_positions.lower, params, *both, jnp.zeros(rows, jnp.int32), config=config)
    if subject.answer_room:
        answer = jnp.zeros(subject.answer_room, jnp.int32), jnp.int32(1)
        add(force_answer.lower, params, part(embed), *answer, cache, config=config)
