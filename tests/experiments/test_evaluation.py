"""Evaluation runs: what a kill leaves, what a run refuses, what its stages make of samples."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.evaluation.folder import append_line, claim, read_lines
from experiments.evaluation.run import means
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import (
    Draft,
    Score,
    limited,
    predict,
    prepare,
    score,
)
from minference_jax import DenseAttention
from models import load_model
from models.common.decoder import forward
from models.common.generate import _generate

DENSE = DenseAttention()
LENGTHS = (40, 90)
STAGES = ("samples", "predictions", "scores")


def question(length, number):
    rng = np.random.default_rng([length, number])
    words = rng.integers(3, 60, length - 4 - number)
    return Sample(
        name=f"{length} {number}",
        task="words",
        length=length,
        prompt=" ".join(f"t{word}" for word in words),
        lead=" t7 t8",
        answers=(f"t{number}",),
        max_new_tokens=2,
    )


def drafts():
    return [
        Draft(f"{length} {number}", "words", length, lambda a=length, b=number: question(a, b))
        for length in LENGTHS
        for number in range(3)
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, dtype=jnp.float32)


def length_of(sample, answer):
    return len(answer) / (len(answer) + sample.length)


def run(folder, model, *, limit=None):
    folder.mkdir(exist_ok=True)
    samples = prepare(folder, limited(drafts(), limit))
    answers = predict(folder, samples, model, DENSE, chat=True, chunk_size=None)
    return samples, answers, score(folder, samples, answers, length_of)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """The folder of a run that nothing stopped, and what it returned."""
    folder = tmp_path_factory.mktemp("run")
    _generate.clear_cache()
    made = run(folder, model)
    assert _generate._cache_size() == len(LENGTHS)  # prompts of a length share a program
    return folder, made


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param({"samples": 0.5}, id="while-preparing"),
        pytest.param({"samples": 1, "predictions": 0.4}, id="while-predicting"),
        pytest.param({"samples": 1, "predictions": 1}, id="before-scoring"),
        pytest.param({"samples": 0.999, "predictions": 0.999, "scores": 0.5}, id="only-ends-lost"),
    ],
)
def test_a_killed_run_ends_with_the_files_of_an_unbroken_one(whole, model, tmp_path, kept):
    unbroken, _ = whole
    for stage, share in kept.items():
        content = (unbroken / f"{stage}.jsonl").read_bytes()
        (tmp_path / f"{stage}.jsonl").write_bytes(content[: int(share * len(content))])
    run(tmp_path, model)
    for stage in STAGES:
        name = f"{stage}.jsonl"
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()


def test_what_is_there_is_not_made_again(whole, model, tmp_path):
    unbroken, (samples, answers, _) = whole
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text().replace(answers[1].answer, "kept"))
    assert prepare(tmp_path, [d._replace(make=None) for d in drafts()]) == samples
    assert run(tmp_path, model)[1][1] == dataclasses.replace(answers[1], answer="kept")


def test_answers_are_greedy_continuations_of_prompt_and_lead(whole, model):
    samples, answers, _ = whole[1]
    for sample, answer in zip(samples, answers, strict=True):
        ids = model.tokenizer.encode(f"{sample.prompt} t7 t8")
        assert answer.prompt_tokens == len(ids)
        tokens = np.zeros((1, 100), np.int32)
        for end in range(len(ids), len(ids) + 3):
            tokens[0, :end] = ids
            logits = forward(
                model.params, jnp.asarray(tokens), config=model.config, attention_fn=DENSE,
                lengths=jnp.array([end]),
            )  # fmt: skip
            ids = [*ids, int(np.argmax(logits[0, end - 1]))]
        new = [token for token in ids[-3:-1] if token not in model.tokenizer.stop_tokens]
        assert answer.answer == model.tokenizer.decode(new)
        assert answer.new_tokens == 2 == len(new)


def test_a_limit_counts_samples_of_each_length_and_can_be_raised(whole, model, tmp_path):
    unbroken, (_, answers, _) = whole
    samples, some, _ = run(tmp_path, model, limit=1)
    assert [sample.name for sample in samples] == ["40 0", "90 0"]
    assert some == [answers[0], answers[3]]
    assert run(tmp_path, model)[1] == answers
    assert (tmp_path / "scores.jsonl").read_bytes() == (unbroken / "scores.jsonl").read_bytes()


def test_names_must_differ():
    with pytest.raises(ValueError, match="2 are called '40 0'"):
        limited([*drafts(), drafts()[0]], None)


def test_means_are_over_task_and_length(whole):
    of = lambda task, length, value: Score(
        name="", task=task, length=length, score=value, density=value / 2
    )
    found = means([of("a", 4, 1.0), of("a", 8, 0.5), of("b", 4, 0.25), of("a", 4, 0.0)])
    assert [tuple(mean) for mean in found] == [
        ("a", 4, 2, 0.5, 0.25),
        ("a", 8, 1, 0.5, 0.25),
        ("b", 4, 1, 0.25, 0.125),
    ]


def test_a_prompt_beyond_the_context_is_told_before_any_is_read(model, tmp_path):
    samples = [question(40, 0), question(5000, 0)]
    with pytest.raises(UserError, match="4998 tokens and up to 2"):
        predict(tmp_path, samples, model, DENSE, chat=True, chunk_size=None)
    assert list(tmp_path.iterdir()) == []


def test_only_a_line_without_its_end_is_removed(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": "é\u2028"})
    append_line(path, {"a": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3}')
    assert read_lines(path) == [{"a": "é\u2028"}, {"a": 2}]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"a"\n' + whole)
    with pytest.raises(UserError, match="damaged"):
        read_lines(path)


def test_a_folder_with_lines_belongs_to_one_setting(tmp_path):
    claim(tmp_path, {"seed": 1, "lengths": (1, 2)})
    claim(tmp_path, {"seed": 0, "lengths": (1, 2)})
    append_line(tmp_path / "samples.jsonl", {})
    claim(tmp_path, {"seed": 0, "lengths": (1, 2), "model": "m"})
    with pytest.raises(UserError, match="made with model = m, this one has n"):
        claim(tmp_path, {"seed": 0, "model": "n"})
    assert json.loads((tmp_path / "settings.json").read_text())["lengths"] == [1, 2]
