"""The stage between samples and scores: answers of a method, in batches."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from experiments.common.session import encode
from experiments.evaluation.answer import Answers, Batch
from experiments.evaluation.folder import append_lines, read_lines
from experiments.evaluation.sample import Sample
from models import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answered.

    Attributes:
        name: of the sample.
        answer: its text, without the lead.
        prompt_tokens: read.
        new_tokens: generated, without the one that ends the answer.
        density: share of the causal pairs visited while the prompt was read, mean over all heads.
        batch: prompts that were read together.
        prefill_seconds: time to the batch's first tokens over its prompts, see `Answers`.
        decode_seconds: time of the batch's other tokens over its prompts.
        cache_bytes: memory of the keys and values of one prompt and its answer.
    """

    name: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    density: float
    batch: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


class Prompt(NamedTuple):
    """A sample as a model reads it.

    Attributes:
        sample: the sample.
        tokens: of the prompt.
        width: tokens that it is padded to, the same for all samples of its length.
        room: tokens of the longest answer to samples of its length.
    """

    sample: Sample
    tokens: Int[np.ndarray, " s"]
    width: int
    room: int


def tokenise(samples: Sequence[Sample], model: Model, *, chat: bool) -> list[Prompt]:
    """Returns the samples with their tokens.

    Args:
        samples: the samples.
        model: the model.
        chat: put prompts into the chat template, if there is one.

    Raises:
        UserError: a prompt and its answer are longer than the context.
    """

    def tokens_of(sample: Sample) -> Int[np.ndarray, " s"]:
        return encode(
            model, sample.prompt, chat=chat, lead=sample.lead, max_new_tokens=sample.max_new_tokens
        )[0]

    with ThreadPoolExecutor() as pool:  # tokenizers leave Python while they work
        made = list(tqdm(pool.map(tokens_of, samples), "tokenising", len(samples), disable=None))
    width: dict[int, int] = {}
    room: dict[int, int] = {}
    for sample, tokens in zip(samples, made, strict=True):
        length = sample.length
        width[length] = max(width.get(length, length), len(tokens))
        room[length] = max(room.get(length, 0), sample.max_new_tokens)
    return [
        Prompt(sample, tokens, width[sample.length], room[sample.length])
        for sample, tokens in zip(samples, made, strict=True)
    ]


def read_predictions(folder: Path) -> dict[str, Prediction]:
    """Returns the predictions of a method's folder by the names of their samples."""
    return {line["name"]: Prediction(**line) for line in read_lines(folder / "predictions.jsonl")}


def predict(
    folder: Path,
    prompts: Sequence[Prompt],
    answer: Callable[[Batch], Answers],
    decode: Callable[[list[int]], str],
    *,
    batch_size: int,
    name: str,
    compile_for: Callable[[Batch], None] | None = None,
) -> list[Prediction]:
    """Answers the prompts that `predictions.jsonl` does not hold, and returns all answers.

    Prompts of one length and answer's length go together; answers do not depend on which.

    Args:
        folder: of the method.
        prompts: all of them.
        answer: answers a batch.
        decode: tokens to text.
        batch_size: prompts answered together at most.
        name: of the method, while progress is shown.
        compile_for: called first with a batch of each shape, to compile for all of them at once.
    """
    known = read_predictions(folder)
    batches = [*_batches(prompts, known, batch_size)]
    if compile_for is not None:
        shapes = {(one[0].width, one[0].sample.length, rows): (one, rows) for one, rows in batches}
        for one, rows in shapes.values():
            compile_for(_stacked(one, rows))
    total, done = (
        sum(prompt.width for prompt in prompts if all_ or prompt.sample.name in known)
        for all_ in (True, False)
    )
    with tqdm(
        desc=name, total=total, initial=done, unit="token", unit_scale=True, disable=None
    ) as bar:
        for members, rows in batches:
            found = _predictions(members, rows, answer(_stacked(members, rows)), decode)
            append_lines(folder / "predictions.jsonl", map(dataclasses.asdict, found))
            known |= {one.name: one for one in found}
            bar.update(sum(prompt.width for prompt in members))
    return [known[prompt.sample.name] for prompt in prompts]


def _batches(
    prompts: Sequence[Prompt], known: dict[str, Prediction], batch_size: int
) -> Iterator[tuple[list[Prompt], int]]:
    """Prompts that are answered together, and the rows of their program."""
    groups: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        sample = prompt.sample
        alike = prompt.width, sample.length, sample.max_new_tokens
        groups.setdefault(alike, []).append(prompt)
    for group in groups.values():
        # A last batch with fewer prompts runs the same program.
        rows = min(batch_size, len(group))
        missing = [prompt for prompt in group if prompt.sample.name not in known]
        for first in range(0, len(missing), rows):
            yield missing[first : first + rows], rows


def _stacked(members: Sequence[Prompt], rows: int) -> Batch:
    """The prompts of a batch, right-padded; the last one again in rows that are left over."""
    [first, *_] = members
    members = [*members, *[members[-1]] * (rows - len(members))]
    tokens = np.zeros((rows, first.width), np.int32)
    for row, prompt in zip(tokens, members, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    lengths = np.array([len(prompt.tokens) for prompt in members], np.int32)
    return Batch(tokens, lengths, first.sample.max_new_tokens, first.room, first.sample.length)


def _predictions(
    members: Sequence[Prompt], rows: int, answers: Answers, decode: Callable[[list[int]], str]
) -> list[Prediction]:
    return [
        Prediction(
            name=prompt.sample.name,
            answer=decode(answers.tokens[row]),
            prompt_tokens=len(prompt.tokens),
            new_tokens=len(answers.tokens[row]),
            density=answers.density[row],
            batch=rows,
            prefill_seconds=answers.prefill_seconds / rows,
            decode_seconds=answers.decode_seconds / rows,
            cache_bytes=answers.cache_bytes // rows,
        )
        for row, prompt in enumerate(members)
    ]
