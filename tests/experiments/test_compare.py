"""`minference compare`: what it measures against numpy, how it goes on, what it refuses."""

import dataclasses
import json
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.prompts import needle_prompt, packaged_chapter
from experiments.common.record import read_records
from experiments.compare import command, measure, programs
from experiments.compare.measure import Subject
from experiments.compare.methods import parse_method, parse_methods
from experiments.compare.prompts import Reading
from experiments.compare.rows import Point, Row
from experiments.compare.summary import markdown, summarise
from models import load_model
from models.common.decoder import forward

LENGTH, ANSWER, POSITIONS = 500, 3, 300
SPARSE = "xattention:0"  # the first block and the query tile's own
SCALING = {"rope_type": "dynamic", "factor": 8.0}


def attention_of(spec):
    return parse_method(spec).attention(2, 4)


@pytest.fixture(scope="module")
def subject(tiny_model):
    """A prompt of a few tokens less than the length that it is padded to."""
    model = load_model(tiny_model, dtype=jnp.float32, rope_scaling=SCALING)
    ids = np.random.default_rng(1).integers(3, 60, LENGTH + ANSWER).tolist()
    tokens, answer = ids[:LENGTH], ids[LENGTH:]
    reading = Reading(name="a", task="needle", tokens=tokens, answer=answer, length=LENGTH + 21)
    return Subject(model=model, reading=reading, positions=POSITIONS, answer_room=ANSWER + 2)


def changed(subject, **fields):
    """The subject with another reading."""
    return dataclasses.replace(subject, reading=dataclasses.replace(subject.reading, **fields))


def measured_by(subject, *specs):
    """Figures of methods."""
    dense = measure.read(subject, attention_of("dense"))
    return {
        spec: measure.figures(subject, measure.read(subject, attention_of(spec)), dense.hidden)
        for spec in specs
    }


@pytest.fixture(scope="module")
def measured(subject):
    """Figures of dense attention and of a method."""
    return measured_by(subject, "dense", SPARSE)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def distributions(subject, spec, tokens):
    """Log probabilities of the next token everywhere, rotated as prompt and answer are."""
    logits = forward(
        subject.model.params,
        jnp.asarray([tokens]),
        config=subject.model.config,
        attention_fn=attention_of(spec),
        rope_length=jnp.array([LENGTH + ANSWER]),
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
    attention = attention_of(SPARSE)

    def observe(attention, q, k, v, **where):
        out, index = attention.attend(q, k, v, **where)
        return out, index.to_mask(LENGTH, LENGTH)[0]

    tokens = jnp.asarray([subject.reading.tokens])
    *_, masks = subject.model.prefill(
        tokens, attention_fn=attention, observe=observe, rope_length=jnp.array([LENGTH + ANSWER])
    )
    masks = np.asarray(masks)
    visited = masks.sum(axis=(2, 3)) / (LENGTH * (LENGTH + 1) / 2)
    tiles = np.pad(masks, ((0, 0), (0, 0), (0, 12), (0, 12))).reshape(2, 4, 4, 128, 4, 128)
    executed = tiles.any(axis=(3, 5)).sum(axis=(2, 3)) / 10
    assert np.all(executed == 0.7)  # 1 + 2 + 2 + 2 of 10
    result = measured[SPARSE]
    np.testing.assert_allclose(result["executed_by_head"], executed, atol=1e-3)
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
    tokens, answer = subject.reading.tokens, [0] * ANSWER
    for number in range(ANSWER):
        found = distributions(subject, "dense", [*tokens, *answer])
        answer[number] = int(found[LENGTH - 1 + number].argmax())
    for said, right in ((answer, True), ([*answer[:-1], answer[-1] ^ 1], False)):
        asked = changed(subject, answer=said)
        assert measured_by(asked, "dense")["dense"]["answer_right"] is right


def test_a_prompt_shorter_than_the_positions_is_compared_whole(subject, measured):
    short = changed(subject, tokens=subject.reading.tokens[:200], answer=[])
    result = measured_by(short, "dense")["dense"]
    assert result["positions"] == 200
    tokens = short.reading.tokens
    logits = forward(
        subject.model.params, jnp.asarray([tokens]), config=subject.model.config,
        attention_fn=attention_of("dense"),
    )  # fmt: skip
    own = log_softmax(logits[0])[np.arange(199), tokens[1:]]
    np.testing.assert_allclose(result["perplexity"], np.exp(-own.mean()), rtol=1e-5)


@pytest.fixture(scope="module")
def unpadded(subject):
    """Figures of prompts without padding, and how often each program was compiled for them."""
    found = Counter()

    def listen(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found[fun_name] += 1

    methods = ("dense", SPARSE, "xattention:0.5")
    plain = dataclasses.replace(changed(subject, length=LENGTH), answer_room=ANSWER)
    short = changed(plain, tokens=subject.reading.tokens[:-9], answer=[5])
    work = [(prompt, attention_of(spec)) for prompt in (plain, short) for spec in methods]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        number = programs.compile_all(work)
        before = Counter(found)
        results = [measured_by(prompt, *methods) for prompt in (plain, short)]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return results[0], number, before, found


def test_padding_of_prompt_and_answer_changes_nothing(unpadded, measured):
    for spec, padded in measured.items():
        plain = unpadded[0][spec]
        assert plain.keys() == padded.keys()
        for name in plain.keys() - {"prefill_seconds"}:
            np.testing.assert_allclose(padded[name], plain[name], rtol=1e-5, atol=1e-9)


def test_programs_are_compiled_once_for_a_structure_before_all_measuring(unpadded):
    """Two structures, three methods, two prompts, each of which is read and counted."""
    _, number, before, after = unpadded
    assert number == 2 * 2 + 2
    names = [f"jit({name})" for name in ("run_read", "count_work", "force_answer")]
    assert [before[name] for name in names] == [2, 2, 1]
    # Distances may be there already: another test compares as many positions.
    assert before["jit(score_positions)"] <= 1
    for name in (*names, "jit(score_positions)"):
        assert after[name] == before[name]


def test_methods_share_structures():
    few = ("a_shape:8,64", "vertical_slash:60,100", "block_sparse:2", "block_sparse:40")
    few += ("hybrid:0.9,20", "hybrid:0.5,50", "threshold:0.5", "dense")
    shared = programs.share_capacities([attention_of(spec) for spec in few])
    structures = [str(jax.tree.structure(attention)) for attention in shared]
    assert [structures.index(one) for one in structures] == [0, 0, 2, 2, 4, 4, 6, 7]


@pytest.mark.parametrize(("spec", "wider"), [("vertical_slash:60,101", "a_shape:99,1"),
                                             ("hybrid:1,20", "hybrid:1,99")])  # fmt: skip
def test_shared_capacities_change_nothing(spec, wider):
    own = dataclasses.replace(attention_of(spec), dense_above=None)
    shared, _ = programs.share_capacities([own, attention_of(wider)])
    assert str(jax.tree.structure(own)) != str(jax.tree.structure(shared))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1500, n, 8)), jnp.float32) for n in (4, 2, 2))

    estimate = jax.jit(lambda attention: attention.layer(0).attend(q, k, v)[1])
    narrow, wide = estimate(own), estimate(shared)
    assert np.all(narrow.density(1500, 1500) < 0.9)
    room = narrow.columns.shape[2]
    assert np.all(narrow.column_count > 0)
    assert room < wide.columns.shape[2]
    cut = dataclasses.replace(wide, columns=wide.columns[:, :, :room])
    jax.tree.map(np.testing.assert_array_equal, cut, narrow)


@pytest.mark.parametrize(
    ("spec", "label", "kind"),
    [
        ("a_shape:128,1024", "a_shape:128,1024", mj.SparseAttention),
        ("tri_shape:8,64,32", "tri_shape:8,64,32", mj.SparseAttention),
        ("vertical_slash:1000,6096", "vertical_slash:1000,6096", mj.SparseAttention),
        ("block_sparse:100", "block_sparse:100", mj.SparseAttention),
        ("triangle_mix:1,8,64,32", "triangle_mix:1,8,64,32", mj.SparseAttention),
        ("threshold:.10", "threshold:0.1", mj.AdaptiveAttention),
        ("threshold:0.1,08", "threshold:0.1,8", mj.AdaptiveAttention),
        ("hybrid:0.1,1000", "hybrid:0.1,1000", mj.AdaptiveAttention),
        ("hybrid:0.1,1000,16", "hybrid:0.1,1000,16", mj.AdaptiveAttention),
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
    patterns = attention_of("triangle_mix:1,8,64,32").patterns
    triangle = mj.TriShape(sink_size=8, window_size=64, last_size=32)
    assert patterns.grid() == [[mj.Dense()] * 4, [triangle] * 4]
    estimator = attention_of("hybrid:0.25,70,16").estimator
    assert estimator.blocks.pooled_rows == 16
    assert (estimator.blocks.alpha.tolist(), estimator.num_columns.tolist()) == (
        [[0.25], [0.25]],
        [[70], [70]],
    )


def test_shuffled_patterns_are_the_same_at_other_heads(tmp_path):
    grid = [[mj.AShape(sink_size=8 * layer + head, window_size=9) for head in range(8)]
            for layer in range(4)]  # fmt: skip
    path = tmp_path / "a,b.json"
    mj.HeadPatterns.from_grid(grid).save(path)
    found = {}
    for words, label in (("", "0"), (",0", "0"), (",1", "1")):
        method = parse_method(f"shuffled:{path}{words}")
        assert (method.family, method.label) == ("shuffled", f"shuffled:a,b.json,{label}")
        sizes = method.attention(4, 8).patterns.sink_size
        assert sorted(sizes.reshape(-1).tolist()) == list(range(32))
        found[words] = sizes.tolist()
    assert found[""] == found[",0"] != found[",1"]
    moved = np.asarray(found[""]) // 8 != np.arange(4)[:, None]
    assert moved.any()  # heads change layers, too


def test_dense_comes_first_and_once():
    methods = parse_methods(("hybrid:0.1,100", "dense"))
    assert [method.label for method in methods] == ["dense", "hybrid:0.1,100"]


def test_the_lead_is_what_stands_before_the_answer():
    prompt = needle_prompt(packaged_chapter(), 300, seed=3)
    assert prompt.text.count(prompt.lead + prompt.answer) == 1
    assert prompt.answer not in prompt.lead


def row(method, prompt, made=("cpu", "1"), **result):
    task, _ = prompt.split()
    point = Point(
        model="m", model_sha256="0", prompt=prompt, task=task, prompt_sha256=prompt, tokens=9,
        length=9, method=method, patterns_sha256=None, positions=9, repeats=1,
    )  # fmt: skip
    result = {
        "executed": 0.2, "visited": 0.1, "kl": 0.5, "top1": 0.5, "perplexity": 2.0,
        "answer_right": None, "prefill_seconds": [3.0, 1.0, 9.0],
    } | result  # fmt: skip
    return Row(point, result, made)


def test_lines_are_over_prompts():
    rows = [
        row("dense", "book 0", perplexity=2.0), row("dense", "code 0", perplexity=10.0),
        row("dense", "needle 0", answer_right=True, perplexity=99.0),
        row("a_shape:1,2", "book 0", kl=9.0),  # measured again below
        row("a_shape:1,2", "book 0", perplexity=4.0, kl=0.5, prefill_seconds=[5.0]),
        row("a_shape:1,2", "code 0", perplexity=20.0, kl=2.5, executed=0.6),
        row("a_shape:1,2", "needle 0", answer_right=True, perplexity=1.0, kl=0.0, executed=0.1),
        row("a_shape:1,2", "needle 1", answer_right=False, prefill_seconds=[4.0], kl=1.0),
    ]  # fmt: skip
    [(group, lines)] = summarise(rows).items()
    assert group.prompts == ("book 0", "code 0", "needle 0", "needle 1")
    dense, line = lines
    assert (dense.method, dense.perplexity_change, dense.answers) == (
        "dense",
        0.0,
        {"needle": (1, 1)},
    )
    assert (line.prompts, line.kl, line.answers) == (4, 1.0, {"needle": (1, 2)})
    assert line.executed == pytest.approx((0.2 + 0.6 + 0.1 + 0.2) / 4)
    assert line.perplexity_change == pytest.approx(1.0)  # the needles' does not count
    assert line.prefill_seconds == 3.5  # of 5, 3, 3, 4
    text = markdown({group: lines})
    assert "| a_shape:1,2 | 4 | 27.5% | 10.0% | 1 | 50.0% | +100.00% | 3.5 s | 1/2 |" in text


def test_rows_made_under_other_conditions_are_not_mixed():
    rows = [row("dense", "book 0", ("cpu", "old")), row("dense", "book 1", ("cpu", "new"), kl=0.0)]
    [(group, [line])] = summarise(rows).items()
    assert (group.prompts, line.kl) == (("book 1",), 0.0)


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
