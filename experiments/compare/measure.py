"""One prompt under one method: what is visited, and how far the model moves from dense."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common.programs import Programs
from experiments.common.quality import force_answer, score_positions
from experiments.compare.prompts import Reading
from minference_jax.pairs import CountedPairs
from minference_jax.search.cost import work_of
from models import Model
from models.common.cache import KVCache
from models.common.capture import read_hidden
from models.common.config import DecoderConfig
from models.common.decoder import Params
from pallas_kernels import BlockSparseIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, a prompt, and how it is measured.

    Programs are compiled for `length`, `rows` and `capacity`; prompts that share these share them.

    Attributes:
        model: the model.
        reading: the prompt.
        positions: last positions of the prompt that are compared; all of a shorter prompt.
        answer_room: tokens of the longest answer of all prompts.
        repeats: runs of the prefill, each timed.
        programs: what is compiled, for this and other prompts.
    """

    model: Model
    reading: Reading
    positions: int
    answer_room: int
    repeats: int = 1
    programs: Programs = dataclasses.field(default_factory=Programs)

    @property
    def rows(self) -> int:
        """Hidden rows that are kept."""
        return min(self.positions, self.reading.length)

    @property
    def compared(self) -> int:
        """How many of them are real."""
        return min(self.rows, len(self.reading.tokens))

    @property
    def capacity(self) -> int:
        """Tokens of a padded prompt and a padded answer."""
        return self.reading.length + self.answer_room


class Run(NamedTuple):
    """A prompt that was read.

    Attributes:
        hidden: the stream behind the layers at the positions compared, padding after them.
        cache: of prompt and answer.
        index: what every layer visited, or how much.
        seconds: of each run, compilation apart; loading, too, if `compile_all` came first.
    """

    hidden: Float[Array, "rows embed"]
    cache: KVCache
    index: BlockSparseIndex | CountedPairs
    seconds: list[float]


def read(subject: Subject, attention: Any) -> Run:
    """Reads the prompt with the attention of a whole model."""
    arguments, static = read_arguments(subject, attention, tokens=len(subject.reading.tokens))
    run = subject.programs.ready(subject.programs.add(run_read.lower, *arguments, **static))
    seconds: list[float] = []
    found: Any = None
    for _ in range(subject.repeats):
        found = None  # two caches at once are not needed
        start = time.perf_counter()
        found = jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    hidden, cache, index = found
    return Run(hidden[0], cache, index, seconds)


def read_arguments(
    subject: Subject, attention: Any, *, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `run_read`, those that are data and those that are static.

    Args:
        subject: the model and the prompt.
        attention: the attention.
        tokens: how many of the prompt's tokens are real.
    """
    model, reading = subject.model, subject.reading
    ids = np.zeros((1, reading.length), np.int32)
    ids[0, : len(reading.tokens)] = reading.tokens
    # Dynamic rotary frequencies go by what the row will have in the end, not by its padding.
    ends = tokens, len(reading.tokens) + len(reading.answer)
    data = (ids, *(np.array([end], np.int32) for end in ends))
    static = {"config": model.config, "rows": subject.rows, "capacity": subject.capacity}
    return (model.params, *map(jnp.asarray, data), attention), static


@functools.partial(jax.jit, static_argnames=("config", "rows", "capacity"))
def run_read(
    params: Params,
    tokens: Int[Array, "1 length"],
    lengths: Int[Array, " 1"],
    rope_length: Int[Array, " 1"],
    attention: Any,
    *,
    config: DecoderConfig,
    rows: int,
    capacity: int,
) -> tuple[Float[Array, "1 rows embed"], KVCache, BlockSparseIndex | CountedPairs]:
    """`read_hidden` with the index of every layer; it is counted apart, not while time is taken."""
    return read_hidden(
        params, tokens, config=config, attention_fn=attention, lengths=lengths,
        rope_length=rope_length, rows=rows, capacity=capacity, observe=_keep_index,
    )  # fmt: skip


def _keep_index(attention, q, k, v, *, lengths, q_offset):
    return attention.attend(q, k, v, lengths=lengths, q_offset=q_offset)


@functools.partial(jax.jit, static_argnames="length")
def count_work(
    index: BlockSparseIndex | CountedPairs, lengths: Int[Array, " 1"], *, length: int
) -> dict[str, Float[Array, "layers heads"]]:
    """What each head visits and executes, as shares of dense attention; a layer at a time."""

    def one_layer(index):
        work = {
            name: work_of(index, length, lengths, measure)
            for name, measure in (("visited", "density"), ("executed", "flops"))
        }
        return {name: count.sparse / count.dense for name, count in work.items()}

    return jax.lax.map(one_layer, index)


def figures(subject: Subject, run: Run, dense_hidden: Float[Array, "rows embed"]) -> dict[str, Any]:
    """Everything that is recorded of a run; uses up its cache.

    Args:
        subject: what was measured.
        run: what `read` returned for a method.
        dense_hidden: the rows that `read` returned for dense attention.
    """
    model, reading, compared = subject.model, subject.reading, subject.compared
    end = len(reading.tokens)
    targets = np.zeros(subject.rows, np.int32)
    targets[: compared - 1] = reading.tokens[end - compared + 1 :]
    program = subject.programs.run
    scored = program(
        score_positions.lower, model.params, run.hidden, dense_hidden, jnp.asarray(targets),
        config=model.config,
    )  # fmt: skip
    kl, agrees, surprise, _ = (np.asarray(x, np.float64)[:compared] for x in scored)
    lengths = jnp.asarray([end], jnp.int32)
    counted = program(count_work.lower, run.index, lengths, length=reading.length)
    visited, executed = (np.asarray(counted[x], np.float64) for x in ("visited", "executed"))
    result: dict[str, Any] = {
        "positions": compared,
        "executed": float(executed.mean()),
        "visited": float(visited.mean()),
        "executed_by_head": np.round(executed, 3),
        "kl": float(kl.mean()),
        "kl_of_next_token": float(kl[-1]),
        "top1": float(agrees.mean()),
        # The last position's next token is not in the prompt.
        "perplexity": float(np.exp(surprise[:-1].mean())),
        "answer_probability": None,
        "answer_right": None,
        "prefill_seconds": run.seconds,
    }
    if number := len(reading.answer):
        answer = np.zeros(subject.answer_room, np.int32)
        answer[:number] = reading.answer
        surprises, likeliest, _ = program(
            force_answer.lower, model.params, run.hidden[compared - 1], jnp.asarray(answer),
            jnp.int32(number), run.cache, config=model.config,
        )  # fmt: skip
        surprises = np.asarray(surprises, np.float64)[:number]
        result["answer_probability"] = float(np.exp(-surprises.sum()))
        result["answer_right"] = bool(np.all(likeliest[:number]))
    return result
