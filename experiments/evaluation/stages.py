"""The first and the last stage of a run: prepare samples, and score their answers.

Each stage, prediction (`predict`) among them, keeps what it makes in a JSONL file, line by line,
and goes on after a kill with the lines that are missing. Scores are made anew: they take no time.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.evaluation.folder import append_lines, read_lines, replace_lines
from experiments.evaluation.predict import Prediction
from experiments.evaluation.sample import Sample

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
class Score:
    """How right an answer is.

    Attributes:
        name: of the sample.
        task: of the sample.
        length: of the sample.
        score: between 0 and 1.
        density: of the prediction, as all that follows.
        prefill_seconds: compilation apart.
        decode_seconds: compilation apart.
        cache_bytes: of keys and values.
    """

    name: str
    task: str
    length: int
    score: float
    density: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


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
    for draft in _with_progress(drafts, known):
        known[draft.name] = draft.make()
        append_lines(path, [dataclasses.asdict(known[draft.name])])
    return [known[draft.name] for draft in drafts]


def _sample(line: dict[str, Any]) -> Sample:
    answers = tuple(line.pop("answers"))
    return Sample(**line, answers=answers)


def score(
    folder: Path, samples: Sequence[Sample], predictions: Sequence[Prediction], metric: Metric
) -> list[Score]:
    """Scores a method's answers, and writes `scores.jsonl` into its folder."""
    scores = [
        Score(
            name=sample.name,
            task=sample.task,
            length=sample.length,
            score=float(metric(sample, prediction.answer)),
            density=prediction.density,
            prefill_seconds=prediction.prefill_seconds,
            decode_seconds=prediction.decode_seconds,
            cache_bytes=prediction.cache_bytes,
        )
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
    replace_lines(folder / "scores.jsonl", map(dataclasses.asdict, scores))
    return scores


def _with_progress(drafts: Sequence[Draft], known: dict[str, Sample]) -> Iterator[Draft]:
    """The drafts that are not made, with a bar over all of them that counts their tokens."""
    missing = [draft for draft in drafts if draft.name not in known]
    total, left = (sum(draft.length for draft in some) for some in (drafts, missing))
    done = total - left
    with tqdm(
        desc="preparing", total=total, initial=done, unit="token", unit_scale=True, disable=None
    ) as bar:
        for draft in missing:
            yield draft
            bar.update(draft.length)
