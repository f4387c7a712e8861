"""`minference compare`: what it writes, how it goes on, what it refuses."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.image import imread

import minference_jax as mj
from experiments.__main__ import main
from experiments.common import calibration
from experiments.common.prompts import Prompt
from experiments.common.record import read_records
from experiments.compare import command


@pytest.fixture
def book(tmp_path):
    """A book in the tiny model's words."""
    words = np.random.default_rng(0).integers(3, 60, (40, 20))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(" ".join(f"t{word}" for word in row) for row in words))
    return path


@pytest.fixture
def compare(tiny_model, book, tmp_path, monkeypatch):
    """Runs the command, whose measurements cost nothing; returns the rows and the calls."""
    calls = []

    def figures(subject, run, dense_hidden):
        calls.append((subject.reading.name, run))
        dense = isinstance(run, mj.DenseAttention)
        return {
            "executed": 1.0 if dense else 0.2 + 0.1 * len(calls), "visited": 0.1,
            "kl": 0.0 if dense else 1 / len(calls), "top1": 0.9, "perplexity": 7.0,
            "answer_probability": 0.5 if subject.reading.answer else None,
            "answer_right": False if subject.reading.answer else None,
            "prefill_seconds": [1.0],
        }  # fmt: skip

    class Read(NamedTuple):
        attention: Any
        hidden: None = None

    monkeypatch.setattr(command, "figures", lambda subject, run, _: figures(subject, run[0], _))
    monkeypatch.setattr(command, "read", lambda subject, attention: Read(attention))
    monkeypatch.setattr(command, "compile_all", len)
    path = tmp_path / "found" / "rows.jsonl"

    def run(*argv):
        common = ["compare", "--rope-scaling", "linear:8", "--length", "500", "--record", path]
        text = [] if "code" in argv else ["--text", book]
        argv = [*common, "--model", tiny_model, *text, *argv]
        assert main([str(word) for word in argv]) == 0
        return read_records(path, kind="compare"), calls

    run.path = path
    return run


METHODS = ["--methods", "a_shape:8,32", "a_shape:8,64"]


def test_rows_tables_and_picture(compare, capsys):
    tasks = ("book", "needle", "multi_needle")
    rows, _ = compare(*METHODS, "--tasks", *tasks, "--prompts", "2")
    named = [(row["config"]["prompt"], row["config"]["method"]) for row in rows]
    labels = ["dense", *METHODS[1:]]
    assert named == [(f"{t} {s}", m) for t in tasks for s in (0, 1) for m in labels]
    assert {row["config"]["length"] for row in rows} == {500}
    assert len({row["config"]["prompt_sha256"] for row in rows}) == 6
    shown = capsys.readouterr().out
    assert shown.count("a_shape:8,64") == 7
    [summary] = read_records(compare.path, kind=command.SUMMARY)
    assert [line["method"] for line in summary["result"]["methods"]] == labels
    assert summary["result"]["methods"][0]["answers"] == {"needle": [0, 2], "multi_needle": [0, 2]}
    pixels = imread(compare.path.with_suffix(".png"))[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_tables_and_picture_come_from_the_record_alone(compare, capsys):
    compare(*METHODS, "--tasks", "book", "needle")
    made = [compare.path.with_suffix(suffix) for suffix in (".md", ".png")]
    before = [path.read_bytes() for path in made]
    for path in made:
        path.unlink()
    capsys.readouterr()
    assert main(["compare-summary", "--record", str(compare.path)]) == 0
    assert [path.read_bytes() for path in made] == before
    shown = capsys.readouterr().out
    assert "500 tokens, 2 prompts" in shown
    assert shown.count("a_shape:8,64") == 1


def test_a_killed_run_goes_on_with_the_missing_rows(compare, monkeypatch):
    figures, seen = command.figures, []

    def killed(subject, run, _):
        seen.append(run)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return figures(subject, run, _)

    with monkeypatch.context() as patch:
        patch.setattr(command, "figures", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(*METHODS, "--tasks", "book")
    before = compare.path.read_text()
    assert len(before.splitlines()) == 2
    compare.path.write_text(before + '{"schema": 1, "kind": "comp')  # cut off while it was written
    rows, calls = compare(*METHODS, "--tasks", "book")
    assert [row["config"]["method"] for row in rows] == ["dense", *METHODS[1:]]
    assert len(calls) == 3
    assert compare.path.read_text().startswith(before)
    assert len(compare(*METHODS, "--tasks", "book")[1]) == 3  # all are there
    assert len(compare(*METHODS, "--tasks", "book", "--positions", "9")[1]) == 6
    assert len(compare(*METHODS, "--tasks", "book", "--seed", "1")[1]) == 9


def test_rows_of_another_revision_are_measured_again(compare):
    compare(*METHODS, "--tasks", "book")
    records = [json.loads(line) for line in compare.path.read_text().splitlines()]
    for record in records:
        record["environment"]["git"] = "another"
    compare.path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(compare(*METHODS, "--tasks", "book")[1]) == 6


def test_static_lines_are_made_once_and_rows_of_others_measured_again(
    compare, tmp_path, monkeypatch
):
    made = []
    static = lambda params, tokens, *, config, sparse: made.append(tokens.shape[1]) or sparse
    monkeypatch.setattr(calibration, "static_attention", static)
    file = tmp_path / "heads.json"
    pattern = mj.VerticalSlash(vertical_size=8, slash_size=8)
    mj.HeadPatterns.uniform(pattern, num_layers=2, num_heads=4).save(file)
    argv = ["--tasks", "book", "--prompts", "2", "--methods", f"static:{file}"]
    rows, _ = compare(*argv)
    assert [row["config"]["method"] for row in rows] == ["dense", "static:heads.json,0"] * 2
    found = [row["result"].get("calibration") for row in rows]
    assert found[0] is found[2] is None
    assert found[1] == found[3]
    assert [found[1]["tokens"]] == made
    assert len(compare(*argv)[0]) == 4
    monkeypatch.setattr(calibration, "code_prompt", lambda words, seed: Prompt(text="t3 " * words))
    rows, _ = compare(*argv)
    assert [row["config"]["method"] for row in rows[4:]] == ["static:heads.json,0"] * 2
    assert rows[4]["result"]["calibration"] != found[1]


def told(capsys, *argv):
    """Runs a command that must fail, and returns the message."""
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--methods", "spiral:3"],
            "'spiral:3' is no method; known: dense[:KERNEL], ",
        ),
        (["--methods", "a_shape:3"], "expected a_shape:SINK_SIZE,WINDOW_SIZE, got 1 numbers"),
        (["--methods", "dense:1"], "kernel must be one of mosaic_gpu, triton, xla, reference, got"),
        (["--methods", "hybrid:0.1,many"], "num_columns must be a whole number, got 'many'"),
        (["--methods", "threshold:x"], "alpha must be a number, got 'x'"),
        (["--methods", "threshold:nan"], "within 0.0..1.0, got nan"),
        (["--methods", "a_shape:3,0"], "`window_size` must be at least 1, got 0"),
        (["--methods", "xattention:0.9,24"], "stride must divide 128, got 24"),
        (["--methods", "triangle_mix:-1,1,1,1"], "at least 0, got -1"),
        (["--methods", "threshold:0.1", "threshold:.1"], "names threshold:0.1 twice"),
        (["--methods", "patterns:none.json"], "none.json"),
        (["--methods", "shuffled:none.json,3"], "expected shuffled:FILE with a pattern file"),
        (["--methods", "threshold:0.1,24"], "pooled_rows must divide 128, got 24"),
        (["--tasks"], "there is no prompt"),
        (["--tasks", "book", "book"], "--tasks names one of them twice"),
        (["--tasks", "key_value", "--text", "a"], "--text belongs to --tasks"),
        (["--text", "none.txt"], "cannot read none.txt"),
        (["--prompt-files", "none.txt"], "cannot read none.txt"),
        (["--positions", "1"], "at least 2, got 1"),
        (["--repeats", "-1"], "at least 1, got -1"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_what_cannot_work_is_told_before_the_model_is_loaded(capsys, tmp_path, argv, words):
    path = tmp_path / "rows.jsonl"
    assert words in told(capsys, "compare", "--model", "no/such/model", "--record", path, *argv)
    assert not path.exists()


@pytest.mark.usefixtures("as_users_see_it")
def test_methods_for_other_models_are_told_before_they_are_run(capsys, tiny_model, book, tmp_path):
    path, patterns = tmp_path / "rows.jsonl", tmp_path / "patterns.json"
    mj.HeadPatterns.uniform(mj.Dense(), num_layers=3, num_heads=4).save(patterns)
    argv = ["compare", "--model", tiny_model, "--record", path, "--length", "40", "--text", book]
    argv += ["--tasks", "book", "--methods"]
    assert "describes 3 layers of 4 heads" in told(capsys, *argv, f"patterns:{patterns}")
    assert "the model has 2" in told(capsys, *argv, "triangle_mix:3,1,1,1")
    assert "--length" not in told(capsys, *argv, "a_shape:1,1", "--length", "5000")
    assert not path.exists()
