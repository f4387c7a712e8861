"""`minference compare`: what it measures against numpy, how it goes on, what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.prompts import needle_prompt, packaged_chapter
from experiments.common.record import read_records
from experiments.compare import command, measure
from experiments.compare.measure import Subject
from experiments.compare.methods import parse_method, parse_methods
from experiments.compare.prompts import Reading
from experiments.compare.report import Row, means
from models import load_model
from models.common.decoder import forward

LENGTH, ANSWER, POSITIONS = 500, 3, 300
SPARSE = "xattention:0"  # the first block and the query tile's own
SCALING = {"rope_type": "linear", "factor": 8.0}


@pytest.fixture(scope="module")
def subject(tiny_model):
    model = load_model(tiny_model, dtype=jnp.float32, rope_scaling=SCALING)
    ids = np.random.default_rng(1).integers(3, 60, LENGTH + ANSWER).tolist()
    reading = Reading(name="random", tokens=ids[:LENGTH], answer=ids[LENGTH:])
    return Subject(model=model, reading=reading, positions=POSITIONS, repeats=0)


@pytest.fixture(scope="module")
def measured(subject):
    """Figures of dense attention and of a method."""
    runs = {}
    dense = measure.read(subject, parse_method("dense"))
    for spec in ("dense", SPARSE):
        method = parse_method(spec)
        runs[spec] = measure.figures(subject, method, measure.read(subject, method), dense.hidden)
    return runs


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def distributions(subject, spec, tokens):
    logits = forward(
        subject.model.params,
        jnp.asarray([tokens]),
        config=subject.model.config,
        attention_fn=subject.attention(parse_method(spec)),
    )
    return log_softmax(logits[0])


def test_figures_are_those_of_whole_distributions(subject, measured):
    tokens, answer = subject.reading.tokens, subject.reading.answer
    dense = distributions(subject, "dense", [*tokens, *answer])[:LENGTH]
    other = distributions(subject, SPARSE, tokens)
    kl = np.sum(np.exp(dense) * (dense - other), axis=1)[-POSITIONS:]
    assert kl.mean() > 1e-4
    result = measured[SPARSE]
    np.testing.assert_allclose(result["kl"], kl.mean(), rtol=1e-3)
    np.testing.assert_allclose(result["kl_of_next_token"], kl[-1], rtol=1e-3)
    agrees = (dense.argmax(axis=1) == other.argmax(axis=1))[-POSITIONS:]
    assert result["top1"] == agrees.mean() < 1
    for spec, found in (("dense", dense), (SPARSE, other)):
        own = found[np.arange(LENGTH - POSITIONS, LENGTH - 1), tokens[-POSITIONS + 1 :]]
        np.testing.assert_allclose(measured[spec]["perplexity"], np.exp(-own.mean()), rtol=1e-5)


def test_dense_is_as_far_from_itself_as_can_be_expected(measured):
    result = measured["dense"]
    assert (result["kl"], result["top1"], result["executed"], result["visited"]) == (0, 1, 1, 1)


def test_shares_are_those_of_the_masks(subject, measured):
    attention = subject.attention(parse_method(SPARSE))

    def observe(attention, q, k, v, **where):
        out, index = attention.attend(q, k, v, **where)
        return out, index.to_mask(LENGTH, LENGTH)[0]

    *_, masks = subject.model.prefill(subject.tokens, attention_fn=attention, observe=observe)
    masks = np.asarray(masks)
    visited = masks.sum(axis=(2, 3)) / (LENGTH * (LENGTH + 1) / 2)
    tiles = np.pad(masks, ((0, 0), (0, 0), (0, 12), (0, 12))).reshape(2, 4, 4, 128, 4, 128)
    executed = tiles.any(axis=(3, 5)).sum(axis=(2, 3)) / 10
    assert np.all(executed == 0.7)  # 1 + 2 + 2 + 2 of 10
    result = measured[SPARSE]
    np.testing.assert_allclose(result["visited_by_head"], visited, atol=1e-5)
    np.testing.assert_allclose(result["executed_by_head"], executed, atol=1e-5)
    np.testing.assert_allclose(result["visited"], np.mean(visited), rtol=1e-5)
    np.testing.assert_allclose(result["executed"], np.mean(executed), rtol=1e-5)


def test_the_answer_is_that_of_teacher_forcing(subject, measured):
    tokens, answer = subject.reading.tokens, subject.reading.answer
    found = distributions(subject, "dense", [*tokens, *answer])[LENGTH - 1 : -1]
    probability = np.exp(found[np.arange(ANSWER), answer].sum())
    np.testing.assert_allclose(measured["dense"]["answer_probability"], probability, rtol=1e-4)
    assert measured["dense"]["answer_right"] is False
    assert measured[SPARSE]["answer_probability"] != pytest.approx(probability, rel=1e-3)


def test_a_right_answer_is_one_that_greedy_decoding_gives(subject):
    model, tokens, dense = subject.model, subject.reading.tokens, parse_method("dense")
    answer = [0] * ANSWER
    for number in range(ANSWER):
        found = distributions(subject, "dense", [*tokens, *answer])
        answer[number] = int(found[LENGTH - 1 + number].argmax())
    for said, right in ((answer, True), ([*answer[:-1], answer[-1] ^ 1], False)):
        reading = Reading(name="greedy", tokens=tokens, answer=said)
        asked = Subject(model=model, reading=reading, positions=POSITIONS, repeats=0)
        run = measure.read(asked, dense)
        assert measure.figures(asked, dense, run, run.hidden)["answer_right"] is right


@pytest.mark.parametrize(
    ("spec", "label", "kind"),
    [
        ("a_shape:128,1024", "a_shape:128,1024", mj.SparseAttention),
        ("tri_shape:8,64,32", "tri_shape:8,64,32", mj.SparseAttention),
        ("vertical_slash:1000,6096", "vertical_slash:1000,6096", mj.SparseAttention),
        ("block_sparse:100", "block_sparse:100", mj.SparseAttention),
        ("triangle_mix:1,8,64,32", "triangle_mix:1,8,64,32", mj.SparseAttention),
        ("threshold:.10", "threshold:0.1", mj.AdaptiveAttention),
        ("hybrid:0.1,1000", "hybrid:0.1,1000", mj.AdaptiveAttention),
        ("xattention:1", "xattention:1", mj.AdaptiveAttention),
        ("flexprefill:0.95,0.1", "flexprefill:0.95,0.1", mj.AdaptiveAttention),
        ("diagonals:32,512", "diagonals:32,512", mj.AdaptiveAttention),
        ("diagonals:32", "diagonals:32", mj.AdaptiveAttention),
    ],
)
def test_methods(spec, label, kind):
    method = parse_method(spec)
    assert (method.label, method.family) == (label, label.split(":")[0])
    assert isinstance(method.attention(2, 4), kind)


def test_sizes_reach_the_patterns():
    patterns = parse_method("triangle_mix:1,8,64,32").attention(2, 4).patterns
    triangle = mj.TriShape(sink_size=8, window_size=64, last_size=32)
    assert patterns.grid() == [[mj.Dense()] * 4, [triangle] * 4]
    estimator = parse_method("hybrid:0.25,70").attention(2, 4).estimator
    assert (estimator.blocks.alpha.tolist(), estimator.num_columns.tolist()) == (
        [[0.25], [0.25]],
        [[70], [70]],
    )


def test_dense_comes_first_and_once():
    methods = parse_methods(("hybrid:0.1,100", "dense"))
    assert [method.label for method in methods] == ["dense", "hybrid:0.1,100"]


def test_the_lead_is_what_stands_before_the_answer():
    prompt = needle_prompt(packaged_chapter(), 300, seed=3)
    assert prompt.text.count(prompt.lead + prompt.answer) == 1
    assert prompt.answer not in prompt.lead


def test_means_over_prompts():
    method = parse_method("block_sparse:4")
    result = {
        "executed": 0.2, "visited": 0.1, "kl": 0.5, "top1": 0.5, "perplexity": 2.0,
        "answer_probability": None, "answer_right": None, "prefill_seconds": [3.0, 1.0, 9.0],
    }  # fmt: skip
    other = result | {
        "kl": 1.5, "perplexity": 8.0, "answer_probability": 0.4, "answer_right": True,
        "prefill_seconds": [5.0],
    }  # fmt: skip
    [row] = means([Row("a", method, result), Row("b", method, other)])
    assert row.result["kl"] == 1.0
    assert row.result["perplexity"] == pytest.approx(4.0)
    assert (row.result["answer_probability"], row.result["answer_right"]) == (0.4, 1.0)
    assert row.result["prefill_seconds"] == [4.0]


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

    def figures(subject, method, run, dense_hidden):
        calls.append((subject.reading.name, method.label))
        cost = 1.0 if method.family == "dense" else 0.2 + 0.1 * len(calls)
        kl = 0.0 if method.family == "dense" else 1 / len(calls)
        return {
            "executed": cost, "visited": cost, "kl": kl, "top1": 0.9, "perplexity": 7.0,
            "answer_probability": 0.5 if subject.reading.answer else None,
            "answer_right": False if subject.reading.answer else None,
            "prefill_seconds": [1.0],
        }  # fmt: skip

    def read(subject, method):
        return measure.Run(method.label, None, {})

    monkeypatch.setattr(command, "figures", figures)
    monkeypatch.setattr(command, "read", read)
    path = tmp_path / "found" / "rows.jsonl"

    def run(*argv):
        common = ["compare", "--rope-scaling", "linear:8", "--length", "500", "--record", path]
        argv = [*common, "--model", tiny_model, "--text", book, *argv]
        assert main([str(word) for word in argv]) == 0
        return read_records(path, kind="compare"), calls

    run.path = path
    return run


METHODS = ["--methods", "a_shape:8,32", "a_shape:8,64"]


def test_rows_table_and_picture(compare, capsys):
    rows, _ = compare(*METHODS, "--tasks", "book", "needle", "--prompts", "2")
    named = [(row["config"]["prompt"], row["config"]["method"]) for row in rows]
    labels = ["dense", *METHODS[1:]]
    assert named == [(f"{t} {s}", m) for t in ("book", "needle") for s in (0, 1) for m in labels]
    assert {row["config"]["tokens"] for row in rows} == {500}
    assert len({row["config"]["prompt_sha256"] for row in rows}) == 4
    shown = capsys.readouterr().out
    assert shown.count("a_shape:8,64") == 5
    assert "mean of 4 prompts" in shown
    pixels = imread(compare.path.with_suffix(".png"))[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_a_killed_run_goes_on_with_the_missing_rows(compare, monkeypatch):
    figures = command.figures

    def killed(subject, method, *rest):
        if method.label == "a_shape:8,64":
            raise KeyboardInterrupt
        return figures(subject, method, *rest)

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


def told(capsys, *argv):
    """Runs a command that must fail, and returns the message."""
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "spiral:3"], "'spiral:3' is no method; known: dense, a_shape:SINK_SIZE"),
        (["--methods", "a_shape:3"], "expected a_shape:SINK_SIZE,WINDOW_SIZE, got 1 numbers"),
        (["--methods", "dense:1"], "expected dense, got 1 numbers"),
        (["--methods", "hybrid:0.1,many"], "num_columns must be a whole number, got 'many'"),
        (["--methods", "threshold:x"], "alpha must be a number, got 'x'"),
        (["--methods", "threshold:nan"], "within 0.0..1.0, got nan"),
        (["--methods", "a_shape:3,0"], "`window_size` must be at least 1, got 0"),
        (["--methods", "xattention:0.9,24"], "stride must divide 128, got 24"),
        (["--methods", "triangle_mix:-1,1,1,1"], "at least 0, got -1"),
        (["--methods", "threshold:0.1", "threshold:.1"], "names threshold:0.1 twice"),
        (["--methods", "patterns:none.json"], "none.json"),
        (["--tasks"], "there is no prompt"),
        (["--tasks", "book", "book"], "--tasks names one of them twice"),
        (["--tasks", "key_value", "--text", "a"], "--text belongs to --tasks"),
        (["--text", "none.txt"], "cannot read none.txt"),
        (["--prompt-files", "none.txt"], "cannot read none.txt"),
        (["--positions", "1"], "at least 2, got 1"),
        (["--repeats", "-1"], "at least 0, got -1"),
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
