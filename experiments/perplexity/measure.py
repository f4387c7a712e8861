"""Perplexity of the beginnings of texts, or of their continuations, beside dense attention's."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from experiments.common.measure import density_of
from experiments.common.programs import Programs
from experiments.common.quality import Positions, score_positions
from experiments.evaluation.folder import append_lines, read_lines
from experiments.perplexity.read import DENSE, Reader, cache_bytes, read
from models import Model


class Text(NamedTuple):
    """The name of a text and its tokens."""

    name: str
    tokens: Int[np.ndarray, " s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The beginning of a text, read by a method and with dense attention and the whole cache.

    Attributes:
        text: its name.
        sha256: of the tokens read.
        length: how many they are.
        dense_nll: mean over the tokens scored (all but the first, or those of the continuation) of
            -log probability given those before, in nats, under dense attention.
        nll: the same under the method.
        kl: mean of KL(dense || method) of their distributions, in nats.
        top1: share of them where the likeliest token is the same.
        density: share of the causal pairs that the method's attention visited, mean over all heads;
            of those of the prompt, if there is a continuation.
        cache_bytes: of what is kept of the prompt; None without a continuation.
    """

    text: str
    sha256: str
    length: int
    dense_nll: float
    nll: float
    kl: float
    top1: float
    density: float
    cache_bytes: int | None = None


class Mean(NamedTuple):
    """All texts at one length; a perplexity is exp of the mean over all their predictions."""

    length: int
    texts: int
    dense_perplexity: float
    perplexity: float
    kl: float
    top1: float
    density: float
    cache_bytes: int | None = None


def measure_all(
    paths: dict[str, Path],
    texts: Sequence[Text],
    lengths: Sequence[int],
    model: Model,
    readers: dict[str, Callable[[int], Reader]],
    continuation: int | None = None,
) -> dict[str, list[Row]]:
    """Measures what files of rows do not hold, and returns the rows of all texts and lengths.

    Dense attention reads each beginning once, whatever the number of methods that miss it.

    Args:
        paths: the JSONL file of each method; each row is appended as soon as it is measured.
        texts: each of at least the longest length.
        lengths: tokens read, the continuation's among them.
        model: the model.
        readers: of each method for a length.
        continuation: last tokens, read onto the cache of those before; None reads all at once.
    """
    known = {label: _read_rows(path) for label, path in paths.items()}
    wanted = {(_sha256(text.tokens[:length]), length): text for length in lengths for text in texts}
    missing = {
        point: [label for label, rows in known.items() if point not in rows] for point in wanted
    }
    made = lambda point: {label: readers[label](point[1]) for label in missing[point]}
    programs = Programs()
    for point in wanted:
        _compile(programs, model, made(point), point[1], continuation)
    total = len(paths) * sum(length for _, length in wanted)
    done = total - sum(length * len(labels) for (_, length), labels in missing.items())
    with tqdm(total=total, initial=done, unit="token", unit_scale=True, disable=None) as bar:
        for point, text in wanted.items():
            sha256, length = point
            bar.set_description(f"{text.name}, {length:,} tokens")
            measured = measure(model, made(point), text.tokens[:length], programs, continuation)
            for label, figures in measured:
                row = Row(text=text.name, sha256=sha256, length=length, **figures)
                append_lines(paths[label], [dataclasses.asdict(row)])
                known[label][point] = row
                bar.update(length)
    return {label: [rows[point] for point in wanted] for label, rows in known.items()}


def _read_rows(path: Path) -> dict[tuple[str, int], Row]:
    rows = (Row(**line) for line in read_lines(path))
    return {(row.sha256, row.length): row for row in rows}


def _compile(
    programs: Programs,
    model: Model,
    readers: dict[str, Reader],
    length: int,
    continuation: int | None,
) -> None:
    """Begins to compile what `measure` runs."""
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    for reader in [DENSE, *readers.values()] if readers else []:
        hidden, _ = programs.add(
            read.lower, model.params, tokens, reader, config=model.config, continuation=continuation
        ).outputs
        programs.add(_score.lower, model.params, hidden, hidden, tokens, config=model.config)


def measure(
    model: Model,
    readers: dict[str, Reader],
    tokens: Int[np.ndarray, " s"],
    programs: Programs,
    continuation: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of a `Row` for each method; dense attention reads first, if there is any.

    Distributions are float32 and few at a time, sums are float64.
    """
    if not readers:
        return
    ids = jnp.asarray(tokens)
    how = {"config": model.config, "continuation": continuation}
    run = lambda reader: programs.run(read.lower, model.params, ids, reader, **how)
    dense = run(DENSE)
    dense_hidden, _ = dense
    for label, reader in readers.items():
        # Another kernel's dense attention (`dense:xla`) is read like any other.
        hidden, pairs = dense if reader == DENSE else run(reader)
        scored = programs.run(
            _score.lower, model.params, hidden, dense_hidden, ids, config=model.config
        )
        kl, agrees, surprise, dense_surprise = (np.mean(np.asarray(x, np.float64)) for x in scored)
        yield (
            label,
            {
                "dense_nll": float(dense_surprise),
                "nll": float(surprise),
                "kl": float(kl),
                "top1": float(agrees),
                "density": density_of(pairs),
                "cache_bytes": cache_bytes(model.params, ids, reader, **how),
            },
        )


@functools.partial(jax.jit, static_argnames="config")
def _score(params, hidden, dense_hidden, tokens, *, config) -> Positions:
    """Of the last tokens, as many as there are rows that predict them."""
    targets = tokens[-hidden.shape[0] :]
    return score_positions(params, hidden, dense_hidden, targets, config=config)


def _sha256(tokens: Int[np.ndarray, " s"]) -> str:
    return hashlib.sha256(tokens.astype(np.int32).tobytes()).hexdigest()


def means(rows: Sequence[Row]) -> list[Mean]:
    """Returns the means over all texts, shortest first."""
    found = []
    for length in sorted({row.length for row in rows}):
        group = [row for row in rows if row.length == length]
        nll, dense_nll, kl, top1, density = (
            float(np.mean([getattr(row, name) for row in group]))
            for name in ("nll", "dense_nll", "kl", "top1", "density")
        )
        found.append(
            Mean(
                length, len(group), float(np.exp(dense_nll)), float(np.exp(nll)), kl, top1, density,
                group[0].cache_bytes,
            )
        )  # fmt: skip
    return found
