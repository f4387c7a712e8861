"""`minference search`: what it writes, how it goes on after a kill, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.search import calibrate, command
from experiments.search.options import CalibrationOptions
from minference_jax.search import LayerScores, for_each_candidate, for_heads
from models import load_model

# A prompt of several tiles, which the tiny model reads with its context stretched.
COMMON = ["search", "--rope-scaling", "linear:8", "--tasks", "book", "--length", "500"]
LINES = ["--kinds", "a_shape", "vertical_slash", "--target", "0.9"]


@pytest.fixture
def book(tmp_path):
    """A book in the tiny model's words."""
    words = np.random.default_rng(0).integers(3, 60, (40, 20))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(" ".join(f"t{word}" for word in row) for row in words))
    return path


@pytest.fixture
def search(tiny_model, book, tmp_path):
    """Runs the command into a folder; returns the folder and the record's result."""

    def run(*argv):
        folder = tmp_path / "found"
        inputs = ["--model", tiny_model, "--text", str(book)]
        assert main([*COMMON, *inputs, "--output", str(folder), *argv]) == 0
        return folder, read_records(folder / "record.jsonl", kind="search")[-1]["result"]

    return run


@pytest.fixture
def scored(monkeypatch):
    """Scores that cost nothing to compute, but depend on the layer's keys; lists their calls."""
    calls = []

    def score(candidates, prompts, **kwargs):
        keys = [np.asarray(prompt.k, np.float64) for prompt in prompts]
        calls.append(keys)
        candidates = for_each_candidate(candidates, heads=4)
        rng = np.random.default_rng(int(1e6 * abs(np.sum(keys))))
        cost = np.sort(rng.uniform(0.1, 1.0, jax.tree.leaves(candidates)[0].shape), axis=0)
        names = ("output_error", "residual_error", "recall", "log_recall", "count")
        values = {name: rng.uniform(0, 1, cost.shape) for name in names}
        return LayerScores(candidates=candidates, kv_heads=2, flops=cost, density=cost, **values)

    monkeypatch.setattr(calibrate, "score_candidates", score)

    def fit(families, prompts, **kwargs):
        windows = [mj.AShape(sink_size=0, window_size=1 + i) for i in range(len(families))]
        return for_heads(windows, num_heads=4)

    monkeypatch.setattr(calibrate, "fit_budgets", fit)
    return calls


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "layers").iterdir()}


def test_patterns_are_found_and_written(search, capsys):
    folder, result = search(*LINES, "--original")
    patterns = mj.HeadPatterns.load(folder / "patterns.json")
    layers = [LayerScores.load(folder / "layers" / f"layer_00{i}.npz") for i in range(2)]
    assert (patterns.num_layers, patterns.num_heads) == (2, 4)
    for scores, row in zip(layers, patterns.grid(), strict=True):
        assert np.all(scores.flops <= 0.9)
        for head, pattern in enumerate(row):
            best = int(scores.residual_error[:, head].argmin())
            assert pattern == scores.candidates.grid()[best][head]
    assert result["prompt_tokens"] == [500]
    assert sum(row["heads"] for row in result["candidates"]) == 8
    shown = capsys.readouterr().out
    assert "vertical_slash 3000:200" in shown
    assert "peak memory" in shown
    pixels = imread(folder / "patterns.png")[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    original = mj.HeadPatterns.load(folder / "best_pattern.json")
    assert original.kind.tolist() == patterns.kind.tolist()


def test_a_killed_search_goes_on_where_it_was(search, scored, monkeypatch):
    score = calibrate.score_candidates

    def killed(*args, **kwargs):
        if scored:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "score_candidates", killed)
        with pytest.raises(KeyboardInterrupt):
            search(*LINES)
    assert len(scored) == 1
    folder, resumed = search(*LINES)
    assert resumed["layers_searched"] == 1
    assert len(scored) == 2
    after, patterns = files(folder), (folder / "patterns.json").read_text()
    assert sorted(after) == ["layer_000.npz", "layer_001.npz"]
    # The same as without the kill.
    for path in (folder / "layers").iterdir():
        path.unlink()
    assert search(*LINES)[1]["layers_searched"] == 2
    for name, content in files(folder).items():
        assert content == after[name], name
    assert (folder / "patterns.json").read_text() == patterns


def test_another_objective_chooses_anew_without_scoring(search, scored):
    folder, _ = search(*LINES)
    before = (folder / "patterns.json").read_text()
    _, result = search(*LINES, "--objective", "recall")
    assert len(scored) == 2
    assert result["layers_searched"] == 0
    assert (folder / "patterns.json").read_text() != before


def least_loss(cost, loss, numbers, limit):
    """By brute force: of some candidates, the best within the limit; without one, the cheapest."""
    within = [n for n in numbers if cost[n] <= limit] or [min(numbers, key=lambda n: cost[n])]
    return min(within, key=lambda n: loss[n])


def test_one_run_gives_other_choices_and_another_target_needs_no_model(
    search, scored, monkeypatch, capsys
):
    levels = ["--kinds", "a_shape", "vertical_slash", "dense", "--levels", "0.85", "0.95"]
    folder, result = search(*levels, "--target", "0.85", "--budget", "global")
    spent = result["chosen"]["flops"]
    assert "dense" in [row["candidate"] for row in result["candidates"] if row["heads"]]
    layers = [LayerScores.load(folder / "layers" / f"layer_00{i}.npz") for i in range(2)]
    # Of each level, the first candidate is the A-shape.
    numbers = {"patterns_each": range(10), "only_a_shape": (0, 5)}
    numbers["only_vertical_slash"] = [n for n in range(10) if n % 5]
    assert result["others"].keys() == {*numbers, "patterns_global"}

    def check(limit):
        for name, allowed in numbers.items():
            found = mj.HeadPatterns.load(folder / f"{name}.json").window_size - 1
            for scores, row in zip(layers, found.tolist(), strict=True):
                each = zip(scores.flops.T, scores.residual_error.T, strict=True)
                assert row == [least_loss(*head, allowed, limit) for head in each], name

    check(0.85)
    common = (folder / "patterns.json").read_text()
    assert common == (folder / "patterns_global.json").read_text()
    assert result["others"]["patterns_global"] == result["chosen"]

    monkeypatch.setattr(command, "load", None)
    again = [*levels[:4], "--budget", "global"]
    _, result = search(*again, "--target", "0.95")
    check(0.95)
    assert spent < result["chosen"]["flops"] <= 0.95
    assert (result["layers_searched"], len(scored)) == (0, 2)
    capsys.readouterr()
    _, result = search(*again, "--target", "0.9")
    assert result["others"].keys() == {"patterns_global"}
    assert not (folder / "only_a_shape.json").exists()
    assert "0.9 is not among the --levels of the scores" in capsys.readouterr().out


def test_a_common_budget_is_kept_and_prompts_are_streamed(search, scored):
    common = ["--budget", "global", "--target", "0.5", "--space", "shipped_v2"]
    _, result = search(*common, "--prompts", "2", "--group", "kv_group")
    assert result["chosen"]["flops"] <= 0.5
    labels = [row["candidate"] for row in result["candidates"]]
    assert "dense" in labels
    assert [len(keys) for keys in scored] == [2, 2]
    first, second = scored[0]
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


def test_the_next_layer_sees_the_patterns_found(search, scored):
    sparse = [*LINES, "--continue-with", "sparse"]
    folder, _ = search(*sparse)
    for path in folder.rglob("*.*"):
        path.unlink()
    search(*LINES)
    assert np.array_equal(scored[0], scored[2])
    assert not np.allclose(scored[1], scored[3], atol=1e-4)


def told(capsys, *argv):
    """Runs a command that must fail, and returns the message."""
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(["--target", "2"], "above 0 and at most 1", id="target"),
        pytest.param(
            ["--target", "0.3", "--space", "paper"], "have the cost they have", id="fixed-space"
        ),
        pytest.param([*LINES, "--target", "0.7"], "budgets execute 0.800", id="impossible-budget"),
        pytest.param([*LINES, "--levels", "0.85"], "must be one of --levels 0.85", id="no-level"),
        pytest.param([*LINES, "--budget", "global", "--levels", "0.9"], "only one", id="one-level"),
        pytest.param([*LINES, "--levels", "0.9", "0.1"], "--levels 0.1 0.9 cannot", id="low-level"),
        pytest.param(["--levels", "0.9", "--space", "paper"], "other spaces", id="no-levels"),
        pytest.param(["--space", "hybrid", "--kinds", "a_shape"], "not apply", id="adaptive-kinds"),
        pytest.param(["--space", "hybrid", "--original"], "cannot hold", id="adaptive-original"),
        pytest.param(["--kinds", "dense"], "no pattern of --kinds dense", id="no-candidate"),
        pytest.param(["--first-row", "500"], "below --length 500", id="first-row"),
        pytest.param(["--original"], "cannot hold BlockSparse", id="original-format"),
        pytest.param(
            ["--budget", "global", "--continue-with", "sparse"], "needs --budget each", id="order"
        ),
        pytest.param(["--text", "none.txt", *LINES], "cannot read none.txt", id="no-book"),
        pytest.param(["--text", "a", "--tasks", "key_value"], "belongs to --tasks", id="two-texts"),
        pytest.param(["--tasks", "book", "book"], "name each task once", id="task-twice"),
        pytest.param(["--prompts", "0"], "at least 1, got 0", id="no-prompts"),
    ],
)
def test_options_that_cannot_work_are_told_before_the_model_is_loaded(
    capsys, tmp_path, argv, words
):
    found = ["--model", "no/such/model", "--output", tmp_path / "found"]
    assert words in told(capsys, *COMMON, *found, *argv)
    assert not (tmp_path / "found" / "settings.json").exists()


def test_several_tasks_are_calibrated_on_one_after_the_other(tiny_model, book):
    model = load_model(tiny_model, rope_scaling={"rope_type": "linear", "factor": 8.0})

    def prompts(*tasks):
        options = CalibrationOptions(tasks=tasks, text=book, length=300, prompts=2, seed=5)
        return calibrate.encode_prompts(model, options)

    both = prompts("needle", "book")
    assert len(both) == 4
    assert both == [*prompts("needle"), *prompts("book")]
    assert len({tuple(tokens) for tokens in both}) == 4


def test_prompts_beyond_context_or_book_are_told(capsys, tiny_model, tmp_path):
    book = ["search", "--tasks", "book", "--model", tiny_model, "--space", "paper"]
    assert "do not fit the model's context" in told(
        capsys, *book, "--length", "5000", "--output", tmp_path / "a"
    )
    (tmp_path / "short.txt").write_text("t1 t2 t3 t4")
    few = ["--text", tmp_path / "short.txt", "--length", "100", "--output", tmp_path / "b"]
    assert "has only 4 tokens, 100 were asked for" in told(capsys, *book, *few)


def test_a_folder_of_another_search_is_left_alone(capsys, search, scored, tiny_model, book):
    folder, _ = search(*LINES)
    before = files(folder)
    again = [*COMMON, "--model", tiny_model, "--text", book, "--output", folder, *LINES]
    message = told(capsys, *again, "--seed", "7", "--prompts", "2")
    assert "--prompts was 1, now 2; --seed was 0, now 7" in message
    (folder / "layers" / "layer_000.npz").write_bytes(b"cut")
    assert "layer_000.npz holds no scores" in told(capsys, *again)
    assert files(folder).keys() == before.keys()
    (folder / "settings.json").write_text(json.dumps({}))
    assert "other settings" in told(capsys, *again)


def test_thresholds_are_found_and_written(search, scored, capsys):
    hybrid = ["--space", "hybrid", "--levels", "0.05", "0.5", "--columns", "20"]
    folder, result = search(*hybrid, "--budget", "global", "--target", "0.8")
    layers = [LayerScores.load(folder / "layers" / f"layer_00{i}.npz") for i in range(2)]
    found = mj.load_attention(folder / "patterns.json")
    alpha = np.asarray(found.estimator.blocks.alpha)
    assert {0.0} < set(alpha.ravel()) <= {np.float32(0.5), np.float32(0.05), 0.0}
    # Dense heads need no columns.
    assert np.array_equal(found.estimator.num_columns, np.where(alpha > 0, 20, 0))
    spent = [
        {0.5: scores.flops[0], 0.05: scores.flops[1], 0.0: np.ones(4)}[round(float(x), 2)][head]
        for scores, row in zip(layers, alpha, strict=True)
        for head, x in enumerate(row)
    ]
    assert result["chosen"]["flops"] == pytest.approx(np.mean(spent))
    assert np.mean(spent) <= 0.8
    each = mj.load_attention(folder / "patterns_each.json").estimator.blocks.alpha
    for scores, row in zip(layers, np.asarray(each), strict=True):
        heads = zip(scores.flops.T, scores.residual_error.T, strict=True)
        best = [least_loss(*head, (0, 1), 0.8) for head in heads]
        assert np.array_equal(row, np.array([0.5, 0.05], np.float32)[best])
    assert "alpha 0.05, 20 columns" in capsys.readouterr().out
    pixels = imread(folder / "patterns.png")[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
