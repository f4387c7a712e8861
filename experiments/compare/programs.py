"""Compiled programs: as few as there are structures of attention, and all before measuring."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.common.quality import force_answer, score_positions
from experiments.compare.measure import Subject, count_work, read_arguments, run_read


def compile_all(work: Sequence[tuple[Subject, Any]]) -> int:
    """Compiles all that measuring these prompts with these attentions will run.

    Tracing needs Python and goes one by one; compilation does not and goes on in threads.

    Returns:
        How many programs there are.
    """
    programs: dict[Any, tuple[Subject, Any]] = {}
    for subject, attention in work:
        data, static = read_arguments(subject, attention, tokens=1)
        leaves, structure = jax.tree.flatten(data[1:])
        shapes = tuple(jax.typeof(leaf) for leaf in leaves)
        programs.setdefault((structure, shapes, *static.values()), (subject, attention))
    threads = max(1, (os.cpu_count() or 1) // 2)
    futures: list[Future] = []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(desc="compiling", unit="program", leave=False, disable=None) as bar,
    ):
        for lowered in _lowered([*programs.values()]):
            futures.append(pool.submit(lowered.compile))
            bar.total = len(futures)
            bar.update(sum(future.done() for future in futures) - bar.n)
        for future in as_completed(futures):
            future.result()
            bar.update(sum(future.done() for future in futures) - bar.n)
    if jax.default_backend() != "cpu":  # the first run also loads a program onto the device
        for subject, attention in tqdm(programs.values(), "loading", leave=False, disable=None):
            data, static = read_arguments(subject, attention, tokens=1)
            jax.block_until_ready(run_read(*data, **static))
    return len(futures)


def _lowered(programs: Sequence[tuple[Subject, Any]]) -> Iterator[jax.stages.Lowered]:
    """What reads a prompt and counts what was visited; what scores it, once for each shape."""
    shapes = set()
    for subject, attention in programs:
        data, static = read_arguments(subject, attention, tokens=1)
        read = run_read.lower(*data, **static)
        yield read
        # Results lie where the parameters do; without that, these would be other programs.
        place = jax.tree.leaves(subject.model.params)[0].sharding
        hidden, cache, index = jax.tree.map(
            lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            read.out_info,
        )
        yield count_work.lower(index, jnp.ones(1, jnp.int32), length=subject.reading.length)
        if (shape := (hidden.shape, subject.capacity, subject.answer_room)) not in shapes:
            shapes.add(shape)
            yield from _lowered_scores(subject, hidden, cache)


def _lowered_scores(subject: Subject, hidden: Any, cache: Any) -> Iterator[jax.stages.Lowered]:
    """Distance from dense attention, and the answer if one is asked for."""
    params, config = subject.model.params, subject.model.config
    part = lambda *shape: jax.ShapeDtypeStruct(shape, hidden.dtype, sharding=hidden.sharding)
    _, rows, embed = hidden.shape
    targets = jnp.zeros(rows, jnp.int32)
    both = part(rows, embed), part(rows, embed)
    yield score_positions.lower(params, *both, targets, config=config)
    if subject.answer_room:
        answer = jnp.zeros(subject.answer_room, jnp.int32)
        yield force_answer.lower(params, part(embed), answer, jnp.int32(1), cache, config=config)
