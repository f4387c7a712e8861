"""`static:FILE`: lines of a calibration prompt in every command, estimated once and recorded."""

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from experiments.__main__ import main
from experiments.common import calibration, methods
from experiments.common.attention import read_attention
from experiments.common.calibration import Attentions
from experiments.common.errors import UserError
from experiments.common.methods import parse_method, parse_methods
from experiments.common.programs import Programs
from experiments.common.prompts import Prompt
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines
from experiments.perplexity import command, measure
from minference_jax.kv_cache import SnapKV
from models import load_model
from models.common.static import static_attention
from tests.experiments.test_needle import BOOK

LENGTH = 300


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Patterns with few lines, so that those of another prompt are others; no head gets dense."""
    keep = lambda name: dataclasses.replace(read_attention(name), dense_above=None)
    monkeypatch.setattr(methods, "read_attention", keep)
    few = mj.VerticalSlash(vertical_size=12, slash_size=9, sink_size=2, window_size=2)
    path = tmp_path / "heads.json"
    mj.HeadPatterns.from_grid([[few] * 4, [few, few, few, mj.Dense()]]).save(path)
    return path


@pytest.fixture(autouse=True)
def source_in_the_models_words(monkeypatch):
    """In place of Python source, of which a tiny model knows no word."""

    def passage(words, *, seed):
        draw = random.Random(seed)
        return Prompt(text=" ".join(f"t{draw.randrange(3, 60)}" for _ in range(words)))

    monkeypatch.setattr(calibration, "code_prompt", passage)


@pytest.fixture
def calibrated(monkeypatch):
    """Token counts of the calibration prompts that are read."""
    read = []

    def note(params, tokens, **how):
        read.append(tokens.shape[1])
        return static_attention(params, tokens, **how)

    monkeypatch.setattr(calibration, "static_attention", note)
    return read


@pytest.fixture(scope="module")
def model(tiny_model):
    scaling = {"rope_type": "linear", "factor": 8.0}
    return load_model(tiny_model, dtype=jnp.float32, rope_scaling=scaling)


def test_lines_are_those_of_the_calibration_prompt(model, file, calibrated):
    named = parse_methods([f"static:{file}", f"patterns:{file}", f"static:{file},1"])
    attentions = Attentions(named, model, chat=True)
    made, sparse, other = (attentions.at(method, LENGTH, asks=False) for method in named)
    assert attentions.at(named[0], LENGTH, asks=False) is made
    assert calibrated == [LENGTH] * 2
    text = calibration.code_prompt(LENGTH, seed=2**32).text
    prompt = jnp.asarray([model.tokenizer.encode(text)], jnp.int32)
    expected = static_attention(model.params, prompt, config=model.config, sparse=sparse)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    assert jax.tree.structure(other) == jax.tree.structure(made)
    assert np.any(np.asarray(other.lines.columns) != made.lines.columns)


def test_a_calibration_prompt_fills_the_length_and_asks(model, file):
    method = parse_method(f"static:{file}")
    attentions = Attentions([method], model, chat=True)
    short, long = attentions.calibrations(method, [200, 120, 200], asks=True)
    plain = attentions.calibrations(method, [200], asks=False)
    assert [one["length"] for one in (short, long)] == [120, 200]
    assert 190 < long["tokens"] <= 200
    assert ["the question" in one["text"] for one in (long, *plain)] == [True, False]
    assert len({one["sha256"] for one in (short, long, *plain)}) == 3
    again = Attentions([method], model, chat=True)
    assert again.calibrations(method, [120, 200], asks=True) == [short, long]
    with pytest.raises(UserError, match="no calibration prompt for 8 tokens: the shortest"):
        attentions.at(method, 8, asks=True)


def test_needle_calibrates_once_and_says_on_what(
    tiny_model, file, tmp_path, capsys, monkeypatch, calibrated
):
    (tmp_path / "book.txt").write_text(BOOK)
    folder = tmp_path / "run"
    argv = ["needle", "--model", tiny_model, "--rope-scaling", "linear:8"]
    argv += ["--text", f"{tmp_path}/book.txt", "--lengths", str(LENGTH), "--depths", "3"]
    argv += ["--output", str(folder), "--methods", f"static:{file}+streaming:4,60"]
    assert main(argv) == 0
    assert len(calibrated) == 1  # but three prompts, which are read one at a time
    [record] = read_records(folder / "record.jsonl", kind="needle")
    [about] = record["result"]["calibrations"]
    assert (about["length"], [about["tokens"]]) == (LENGTH, calibrated)
    settings = json.loads((folder / "static-heads.json,0+streaming-4,60/settings.json").read_text())
    assert settings[f"calibration_{LENGTH}"] == about
    assert main(argv) == 0
    assert len(calibrated) == 1  # all is there
    monkeypatch.setattr(calibration, "code_prompt", lambda words, seed: Prompt(text="t3 " * words))
    capsys.readouterr()
    assert main(argv) == 2
    assert f"made with calibration_{LENGTH} = " in capsys.readouterr().err


def test_perplexity_shares_its_programs_and_goes_on_after_a_kill(
    tiny_model, file, tmp_path, calibrated, monkeypatch
):
    for name in "ab":
        words = random.Random(name).choices(BOOK.split(), k=LENGTH)
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    folder = tmp_path / "run"
    argv = ["perplexity", "--model", tiny_model, "--rope-scaling", "linear:8"]
    argv += ["--texts", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "--lengths", str(LENGTH)]
    argv += ["--output", str(folder), "--methods", f"static:{file}", f"static:{file},1"]
    compiled = Programs()
    monkeypatch.setattr(measure, "Programs", lambda: compiled)
    assert main(argv) == 0
    assert len(compiled) == 3  # dense attention, both methods, distances
    assert calibrated == [LENGTH] * 2
    records = [one["result"] for one in read_records(folder / "record.jsonl", kind="perplexity")]
    calibrations = [one["calibrations"][0] for one in records]
    assert [one["text"] for one in calibrations] == [f"Python's library, seed {x}" for x in (0, 1)]
    assert len({row["nll"] for one in records for row in one["rows"]}) == 4
    path = folder / "static-heads.json,0" / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert main(argv) == 0
    assert calibrated == [LENGTH] * 3
    assert path.read_bytes() == whole


def test_lines_before_a_continuation_are_those_of_a_prompt_without_it(
    tiny_model, file, tmp_path, monkeypatch
):
    class Asked(Exception):
        pass

    def ask(paths, texts, lengths, model, readers, continuation):
        [reader] = readers.values()
        assert reader(lengths[0]) == (LENGTH - 20, SnapKV(budget=64))
        raise Asked

    monkeypatch.setattr(command, "measure_all", ask)
    # In place of the attention: how many tokens its lines are taken from.
    tokens_read = lambda params, tokens, **how: tokens.shape[1]
    monkeypatch.setattr(calibration, "static_attention", tokens_read)
    (tmp_path / "a.txt").write_text("t3 " * LENGTH)
    argv = ["perplexity", "--model", tiny_model, "--rope-scaling", "linear:8", "--continuation"]
    argv += ["20", "--texts", f"{tmp_path}/a.txt", "--lengths", str(LENGTH)]
    argv += ["--output", str(tmp_path / "run"), "--methods", f"static:{file}+snapkv:64"]
    with pytest.raises(Asked):
        main(argv)
    path = tmp_path / "run" / "static-heads.json,0+snapkv-64" / "settings.json"
    assert json.loads(path.read_text())[f"calibration_{LENGTH - 20}"]["tokens"] == LENGTH - 20


def test_conversations_are_read_with_the_lines(tiny_model, file, tmp_path, calibrated):
    (tmp_path / "book.txt").write_text(BOOK)
    folder = tmp_path / "run"
    argv = ["scbench", "--model", tiny_model, "--rope-scaling", "linear:8", "--tasks", "needles"]
    argv += ["--text", f"{tmp_path}/book.txt", "--lengths", str(LENGTH), "--turns", "2"]
    argv += [
        "--modes",
        "multi_turn",
        "--samples",
        "2",
        "--output",
        str(folder),
        "--methods",
        f"static:{file}",
    ]
    assert main(argv) == 0
    [record] = read_records(folder / "record.jsonl", kind="scbench")
    assert [one["length"] for one in record["result"]["calibrations"]] == [LENGTH]
    assert len(calibrated) == 1
    lines = read_lines(folder / "static-heads.json,0" / "multi_turn" / "predictions.jsonl")
    assert [0 < line["density"] < 1 for line in lines] == [True] * 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("static:none.json", "expected static:FILE with a pattern file; .*no pattern file at none"),
        ("static:smollm2-135m-thresholds", "needs a file of patterns, and this one holds thresh"),
        ("static:a_shape.json", "no head of this file is vertical_slash"),
    ],
)
@pytest.mark.parametrize(
    "command", ["needle", "ruler", "infinitebench", "scbench", "perplexity", "compare"]
)
def test_files_without_lines_are_told_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, command, spec, words
):
    monkeypatch.chdir(tmp_path)
    shape = mj.AShape(sink_size=2, window_size=8)
    mj.HeadPatterns.uniform(shape, num_layers=2, num_heads=4).save("a_shape.json")
    assert main([command, "--model", "missing", "--methods", spec]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_another_models_file_and_chunks_are_refused(tiny_model, tmp_path, capsys, file):
    argv = ["needle", "--model", tiny_model, "--output", str(tmp_path / "run"), "--methods"]
    assert main([*argv, "static:smollm2-135m"]) == 2
    assert "describes 30 layers of 9 heads, but the model has 2" in capsys.readouterr().err
    assert main([*argv, f"static:{file}", "--chunk-size", "64"]) == 2
    assert "needs the whole prompt at once; leave out --chunk-size" in capsys.readouterr().err
