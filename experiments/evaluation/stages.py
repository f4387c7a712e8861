"""The stages of a run: prepare samples, predict answers, score them.

Each stage keeps what it makes in a JSONL file of the run's folder, line by line, and goes on after
a kill with the lines that are missing. Scores are made anew: they take no time.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

import minference_jax as mj
from experiments.common.measure import density_of
from experiments.common.session import encode
from experiments.evaluation.folder import append_line, read_lines, replace_lines
from experiments.evaluation.sample import Sample
from models import Model
from models.common.generate import Sampling, generate

# Between 0 and 1: how right an answer to a sample is.
Metric = Callable[[Sample, str], float]


class Draft(NamedTuple):
    """A sample before it is made.

    Attributes:
        name: the sample's.
        task: the sample's.
        length: the sample's.
        make: makes it, the same one each time.
    """

    name: str
    task: str
    length: int
    make: Callable[[], Sample]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answered.

    Attributes:
        name: of the sample.
        answer: its text, without the lead.
        prompt_tokens: read.
        new_tokens: generated, without the one that ends the answer.
        density: share of the causal pairs visited while the prompt was read, mean over all heads.
    """

    name: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    density: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How right an answer is.

    Attributes:
        name: of the sample.
        task: of the sample.
        length: of the sample.
        score: between 0 and 1.
        density: of the prediction.
    """

    name: str
    task: str
    length: int
    score: float
    density: float


def limited(drafts: Sequence[Draft], limit: int | None) -> list[Draft]:
    """Returns the first drafts of each task and length, all if there is no limit.

    Raises:
        ValueError: two have the same name.
    """
    [(name, times)] = Counter(draft.name for draft in drafts).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"names of samples must differ, {times} are called {name!r}")
    seen: Counter[tuple[str, int]] = Counter()
    kept = []
    for draft in drafts:
        seen[draft.task, draft.length] += 1
        if limit is None or seen[draft.task, draft.length] <= limit:
            kept.append(draft)
    return kept


def prepare(folder: Path, drafts: Sequence[Draft]) -> list[Sample]:
    """Makes the samples that `samples.jsonl` does not hold, and returns all that are drafted."""
    path = folder / "samples.jsonl"
    known = {line["name"]: _sample(line) for line in read_lines(path)}
    for draft in _with_progress("preparing", drafts, known):
        known[draft.name] = draft.make()
        append_line(path, dataclasses.asdict(known[draft.name]))
    return [known[draft.name] for draft in drafts]


def _sample(line: dict[str, Any]) -> Sample:
    answers = tuple(line.pop("answers"))
    return Sample(**line, answers=answers)


def predict(
    folder: Path,
    samples: Sequence[Sample],
    model: Model,
    attention: Any,
    *,
    chat: bool,
    chunk_size: int | None,
) -> list[Prediction]:
    """Answers the samples that `predictions.jsonl` does not hold, and returns all answers.

    Decoding is greedy. Prompts of a length are padded to one length and share a compiled program,
    if their answers may take as many tokens.

    Args:
        folder: of the run.
        samples: the samples.
        model: the model.
        attention: used while prompts are read, with a leading [layers] axis on its arrays.
        chat: put prompts into the chat template, if there is one.
        chunk_size: prompt tokens read at a time, all if None.

    Raises:
        UserError: a prompt and its answer are longer than the context; before any is read.
    """
    path = folder / "predictions.jsonl"
    known = {line["name"]: Prediction(**line) for line in read_lines(path)}
    if all(sample.name in known for sample in samples):
        return [known[sample.name] for sample in samples]

    def tokens_of(sample: Sample) -> Int[np.ndarray, " s"]:
        return encode(
            model, sample.prompt, chat=chat, lead=sample.lead, max_new_tokens=sample.max_new_tokens
        )[0]

    with ThreadPoolExecutor() as pool:  # tokenizers leave Python while they work
        made = tqdm(pool.map(tokens_of, samples), "tokenising", len(samples), disable=None)
        prompts = dict(zip((sample.name for sample in samples), made, strict=True))
    room: dict[int, int] = defaultdict(int)
    for sample in samples:
        room[sample.length] = max(room[sample.length], sample.length, len(prompts[sample.name]))
    for sample in _with_progress("predicting", samples, known):
        known[sample.name] = _answer(
            model, sample, prompts[sample.name], attention, room[sample.length], chunk_size
        )
        append_line(path, dataclasses.asdict(known[sample.name]))
    return [known[sample.name] for sample in samples]


def _answer(
    model: Model,
    sample: Sample,
    prompt: Int[np.ndarray, " s"],
    attention: Any,
    room: int,
    chunk_size: int | None,
) -> Prediction:
    result = generate(
        model.params,
        jnp.asarray(np.pad(prompt, (0, room - len(prompt)))[None]),
        config=model.config,
        attention_fn=attention,
        max_new_tokens=sample.max_new_tokens,
        sampling=Sampling(),
        lengths=jnp.asarray([len(prompt)], jnp.int32),
        stop_tokens=model.tokenizer.stop_tokens,
        chunk_size=chunk_size,
        observe=mj.observe_density,
    )
    new = np.asarray(result.tokens)[0, : int(result.lengths[0])].tolist()
    return Prediction(
        name=sample.name,
        answer=model.tokenizer.decode(new),
        prompt_tokens=len(prompt),
        new_tokens=len(new),
        density=density_of(result.observed),
    )


def score(
    folder: Path, samples: Sequence[Sample], predictions: Sequence[Prediction], metric: Metric
) -> list[Score]:
    """Scores the answers, and writes `scores.jsonl`."""
    scores = [
        Score(
            name=sample.name,
            task=sample.task,
            length=sample.length,
            score=float(metric(sample, prediction.answer)),
            density=prediction.density,
        )
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
    replace_lines(folder / "scores.jsonl", map(dataclasses.asdict, scores))
    return scores


def _with_progress[Item: (Draft, Sample)](
    doing: str, items: Sequence[Item], known: dict[str, Any]
) -> Iterator[Item]:
    """The items that are not known, with a bar over all of them that counts their tokens."""
    missing = [item for item in items if item.name not in known]
    total, left = (sum(item.length for item in some) for some in (items, missing))
    with tqdm(
        desc=doing, total=total, initial=total - left, unit="token", unit_scale=True, disable=None
    ) as bar:
        for item in missing:
            yield item
            bar.update(item.length)
