"""Perplexity of the beginnings of texts, under dense attention and under others."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import minference_jax as mj
from experiments.common.measure import density_of
from experiments.common.programs import Programs
from experiments.common.quality import Positions, score_positions
from experiments.evaluation.folder import append_lines, read_lines
from minference_jax.attention import VisitedPairs
from models import Model
from models.common.capture import read_hidden
from models.common.config import DecoderConfig
from models.common.decoder import Params


class Text(NamedTuple):
    """The name of a text and its tokens."""

    name: str
    tokens: Int[np.ndarray, " s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The beginning of a text, read with dense attention and with another.

    Attributes:
        text: its name.
        sha256: of the tokens read.
        length: how many they are.
        dense_nll: mean over all tokens but the first of -log probability given those before, in
            nats, under dense attention.
        nll: the same under the other attention.
        kl: mean of KL(dense || other) of the next token's distribution, in nats.
        top1: share of the positions where the likeliest next token is the same.
        density: share of the causal pairs that the other visited, mean over all heads.
    """

    text: str
    sha256: str
    length: int
    dense_nll: float
    nll: float
    kl: float
    top1: float
    density: float


class Mean(NamedTuple):
    """All texts at one length; a perplexity is exp of the mean over all their predictions."""

    length: int
    texts: int
    dense_perplexity: float
    perplexity: float
    kl: float
    top1: float
    density: float


def measure_all(
    paths: dict[str, Path],
    texts: Sequence[Text],
    lengths: Sequence[int],
    model: Model,
    attentions: dict[str, Callable[[int], Any]],
) -> dict[str, list[Row]]:
    """Measures what files of rows do not hold, and returns the rows of all texts and lengths.

    Dense attention reads each beginning once, whatever the number of methods that miss it.

    Args:
        paths: the JSONL file of each method; each row is appended as soon as it is measured.
        texts: each of at least the longest length.
        lengths: tokens read.
        model: the model.
        attentions: of each method for a length, with a leading [layers] axis on its arrays.
    """
    known = {label: _read_rows(path) for label, path in paths.items()}
    wanted = {(_sha256(text.tokens[:length]), length): text for length in lengths for text in texts}
    missing = {
        point: [label for label, rows in known.items() if point not in rows] for point in wanted
    }
    made = lambda point: {label: attentions[label](point[1]) for label in missing[point]}
    programs = Programs()
    for point in wanted:
        _compile(programs, model, made(point), point[1])
    total = len(paths) * sum(length for _, length in wanted)
    done = total - sum(length * len(labels) for (_, length), labels in missing.items())
    with tqdm(total=total, initial=done, unit="token", unit_scale=True, disable=None) as bar:
        for point, text in wanted.items():
            sha256, length = point
            bar.set_description(f"{text.name}, {length:,} tokens")
            for label, figures in measure(model, made(point), text.tokens[:length], programs):
                row = Row(text=text.name, sha256=sha256, length=length, **figures)
                append_lines(paths[label], [dataclasses.asdict(row)])
                known[label][point] = row
                bar.update(length)
    return {label: [rows[point] for point in wanted] for label, rows in known.items()}


def _read_rows(path: Path) -> dict[tuple[str, int], Row]:
    rows = (Row(**line) for line in read_lines(path))
    return {(row.sha256, row.length): row for row in rows}


def _compile(programs: Programs, model: Model, attentions: dict[str, Any], length: int) -> None:
    """Begins to compile what `measure` runs."""
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    for attention in [mj.DenseAttention(), *attentions.values()] if attentions else []:
        hidden, _ = programs.add(
            _read.lower, model.params, tokens, attention, config=model.config
        ).outputs
        programs.add(_score.lower, model.params, hidden, hidden, tokens, config=model.config)


def measure(
    model: Model, attentions: dict[str, Any], tokens: Int[np.ndarray, " s"], programs: Programs
) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of a `Row` for each method; dense attention reads first, if there is any.

    Distributions are float32 and few at a time, sums are float64.
    """
    if not attentions:
        return
    ids = jnp.asarray(tokens)
    run = functools.partial(programs.run, config=model.config)
    read = functools.partial(run, _read.lower, model.params, ids)
    dense = read(mj.DenseAttention())
    dense_hidden, _ = dense
    for label, attention in attentions.items():
        # Another kernel's dense attention (`dense:xla`) is read like any other.
        hidden, pairs = dense if attention == mj.DenseAttention() else read(attention)
        scored = run(_score.lower, model.params, hidden, dense_hidden, ids)
        kl, agrees, surprise, dense_surprise = (np.mean(np.asarray(x, np.float64)) for x in scored)
        yield (
            label,
            {
                "dense_nll": float(dense_surprise),
                "nll": float(surprise),
                "kl": float(kl),
                "top1": float(agrees),
                "density": density_of(pairs),
            },
        )


@functools.partial(jax.jit, static_argnames="config")
def _read(
    params: Params, tokens: Int[Array, " s"], attention: Any, *, config: DecoderConfig
) -> tuple[Float[Array, "s embed"], VisitedPairs]:
    """The stream behind the layers at every position, and what was visited."""
    length = tokens.shape[0]
    lengths = jnp.full(1, length, jnp.int32)
    hidden, _, pairs = read_hidden(
        params, tokens[None], config=config, attention_fn=attention, lengths=lengths,
        rope_length=lengths, rows=length, capacity=length, observe=mj.observe_density,
    )  # fmt: skip
    return hidden[0], pairs


@functools.partial(jax.jit, static_argnames="config")
def _score(params, hidden, dense_hidden, tokens, *, config) -> Positions:
    """Of all positions but the last, whose next token is not in the text."""
    return score_positions(params, hidden[:-1], dense_hidden[:-1], tokens[1:], config=config)


def _sha256(tokens: Int[np.ndarray, " s"]) -> str:
    return hashlib.sha256(tokens.astype(np.int32).tobytes()).hexdigest()


def means(rows: Sequence[Row]) -> list[Mean]:
    """Returns the means over all texts, shortest first."""
    found = []
    for length in sorted({row.length for row in rows}):
        group = [row for row in rows if row.length == length]
        nll, dense_nll, *others = (
            float(np.mean([getattr(row, name) for row in group]))
            for name in ("nll", "dense_nll", "kl", "top1", "density")
        )
        found.append(
            Mean(length, len(group), float(np.exp(dense_nll)), float(np.exp(nll)), *others)
        )
    return found
