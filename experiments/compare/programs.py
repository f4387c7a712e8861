"""Compiled programs: as few as there are structures of attention, and all before measuring."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import minference_jax as mj
from experiments.compare.measure import Subject, count_work, read_arguments, run_read


def share_capacities(attentions: Sequence[Any]) -> list[Any]:
    """The same attentions with common static capacities, so that fewer programs serve them all.

    A capacity is room: what is visited does not change. Patterns of heads share two programs, with
    and without block-sparse heads; estimators that add columns share one for each kind of them.
    """
    patterns = [a.patterns for a in attentions if isinstance(a, mj.SparseAttention)]
    added = [a.estimator for a in attentions if _has_columns(a)]
    columns = max((p.max_columns for p in patterns), default=0)
    blocks = max((p.max_blocks for p in patterns), default=0)
    more = max((estimator.max_columns for estimator in added), default=0)

    def shared(attention: Any) -> Any:
        if isinstance(attention, mj.SparseAttention):
            own = attention.patterns
            room = {"max_columns": columns, "max_blocks": blocks if own.max_blocks else 0}
            return dataclasses.replace(attention, patterns=dataclasses.replace(own, **room))
        if _has_columns(attention):
            estimator = dataclasses.replace(attention.estimator, max_columns=more)
            return dataclasses.replace(attention, estimator=estimator)
        return attention

    return [shared(attention) for attention in attentions]


def _has_columns(attention: Any) -> bool:
    return isinstance(attention, mj.AdaptiveAttention) and isinstance(
        attention.estimator, mj.WithColumns
    )


def compile_all(work: Sequence[tuple[Subject, Any]]) -> int:
    """Compiles all that reading these prompts with these attentions will run; returns the number.

    Tracing needs Python and goes one by one; compilation does not and goes on in threads.
    """
    programs: dict[Any, tuple[Subject, Any]] = {}
    for subject, attention in work:
        data, static = read_arguments(subject, attention, tokens=1)
        leaves, structure = jax.tree.flatten(data[1:])
        shapes = tuple(jax.typeof(leaf) for leaf in leaves)
        programs.setdefault((structure, shapes, *static.values()), (subject, attention))
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(threads) as pool, tqdm(
        total=2 * len(programs), desc="compiling", unit="program", disable=None
    ) as bar:  # fmt: skip
        futures: list[Future] = []
        for subject, attention in programs.values():
            for lowered in _lower(subject, attention):
                futures.append(pool.submit(lowered.compile))
                bar.update(sum(future.done() for future in futures) - bar.n)
        for future in as_completed(futures):
            future.result()
            bar.update(sum(future.done() for future in futures) - bar.n)
    if jax.default_backend() != "cpu":  # the first run also loads a program onto the device
        for subject, attention in tqdm(programs.values(), desc="loading", disable=None):
            data, static = read_arguments(subject, attention, tokens=1)
            jax.block_until_ready(run_read(*data, **static))
    return 2 * len(programs)


def _lower(subject: Subject, attention: Any) -> list[jax.stages.Lowered]:
    """The programs that read a prompt and that count what was visited."""
    data, static = read_arguments(subject, attention, tokens=1)
    read = run_read.lower(*data, **static)
    # The index will lie where the parameters do; without that, it would be another program.
    place = jax.tree.leaves(subject.model.params)[0].sharding
    _, _, index = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), read.out_info
    )
    lengths = jnp.ones(1, jnp.int32)
    return [read, count_work.lower(index, lengths, length=subject.reading.length)]
