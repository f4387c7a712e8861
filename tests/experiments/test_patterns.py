"""`minference patterns`: the analyses against brute force, and what the commands write."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.patterns import all_command, options
from experiments.patterns.coverage import column_mass, columns_kept, rows_kept
from experiments.patterns.decoding import decoding_kept
from experiments.patterns.distribution import distribution
from experiments.patterns.maps import head_map
from experiments.patterns.read import spread_rows
from experiments.patterns.recall import ladder, top_k_density, top_k_recall, tradeoff
from tests.core.brute_force import mask_of_lines
from tests.helpers import causal_mask, random_qkv

LENGTH, HEADS = 300, 4
KS = (1, 7, 60, 300)


def weights_of(q, k):
    """Softmax weights [heads, length, length] in float64."""
    keys = np.repeat(k[0].astype(np.float64), q.shape[2] // k.shape[2], axis=1)
    scores = np.einsum("qhd,khd->hqk", q[0].astype(np.float64), keys) / np.sqrt(q.shape[3])
    scores = np.where(causal_mask(len(keys), len(keys)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


@pytest.fixture(scope="module")
def prompts():
    """Queries, keys and weights of two prompts, with some heavy keys in common."""
    result = []
    for seed in (0, 1):
        q, k, _ = random_qkv(seed, q_len=LENGTH, heads=HEADS)
        k[:, 20:25] += 0.7 * q.mean(axis=(1, 2))
        q = 2 * q
        result.append((jnp.asarray(q), jnp.asarray(k), weights_of(q, k)))
    return result


def heaviest(weights, size):
    return set(np.argsort(-weights, kind="stable")[:size].tolist())


def kept_by(weights, mine, theirs):
    """Weight inside each set, and the common share of them."""
    inside = [weights[sorted(chosen)].sum() for chosen in (mine, theirs)]
    return [*inside, len(mine & theirs) / len(mine)]


def test_columns_kept_of_this_and_of_another_prompt(prompts):
    (q, k, weights), (other_q, other_k, others) = prompts
    mass, other = column_mass(q, k), column_mass(other_q, other_k)
    np.testing.assert_allclose(mass, weights.mean(axis=1), rtol=1e-5)
    got = np.stack(columns_kept(mass, other, ks=KS), axis=-1)
    for head in range(HEADS):
        own, foreign = weights[head].mean(axis=0), others[head].mean(axis=0)
        for at, size in enumerate(KS):
            want = kept_by(own, heaviest(own, size), heaviest(foreign, size))
            np.testing.assert_allclose(got[head, at], want, atol=1e-5)
    assert (got[:, 1, 1] < got[:, 1, 0]).all()


def test_rows_kept_of_this_and_of_another_prompt(prompts):
    (q, k, weights), (other_q, other_k, others) = prompts
    # More than a block of rows, the last block filled up.
    rows = spread_rows(LENGTH, 150)
    assert (rows[0], rows[-1], len(rows)) == (0, LENGTH - 1, 150)
    got = np.stack(rows_kept((q, k), (other_q, other_k), jnp.asarray(rows), ks=KS), axis=-1)
    for head in range(HEADS):
        for at, size in enumerate(KS):
            want = [
                kept_by(
                    weights[head, row],
                    heaviest(weights[head, row, : row + 1], size),
                    heaviest(others[head, row, : row + 1], size),
                )
                for row in rows
            ]
            np.testing.assert_allclose(got[head, at], np.mean(want, axis=0), atol=1e-5)


def test_top_k_recall_and_its_cost(prompts):
    q, k, weights = prompts[0]
    rows = np.array([0, 5, 100, 299])
    got = top_k_recall(q, k, jnp.asarray(rows), ks=KS)
    for at, size in enumerate(KS):
        want = -np.sort(-weights[:, rows], axis=2)[..., :size].sum(axis=2).mean(axis=1)
        np.testing.assert_allclose(got[at], want, atol=1e-5)
        pairs = np.minimum(size, 1 + np.arange(LENGTH)).sum()
        assert top_k_density([size], LENGTH)[0] == pytest.approx(pairs * 2 / LENGTH / (LENGTH + 1))


def test_tradeoff_is_that_of_the_visited_mask(prompts):
    q, k, weights = prompts[0]
    few = mj.AShape(sink_size=2, window_size=8)
    grid = [[pattern] * HEADS for pattern in (mj.Dense(), few)]
    patterns, length = mj.HeadPatterns.from_grid(grid), 290
    rows, lengths = jnp.asarray(spread_rows(length, 90)), jnp.array([length])
    got = tradeoff(patterns, q, k, rows, lengths=lengths)
    # Tiles are staggered: half of the 128 queries share their starts.
    lines = mask_of_lines(
        range(2), range(8), q_len=length, kv_len=length, offset=0, length=length,
        block_q=64, block_kv=128,
    )  # fmt: skip
    for number, mask in enumerate((causal_mask(length, length), lines)):
        recall = (weights[:, :length, :length] * mask)[:, np.asarray(rows)].sum(axis=2).mean(axis=1)
        np.testing.assert_allclose(got.recall[number], recall, atol=1e-5)
        visited = mask.sum() * 2 / length / (length + 1)
        np.testing.assert_allclose(got.visited[number], visited, rtol=1e-5)
    assert got.recall[1].max() < 0.99
    assert (got.executed[0] == 1).all()


def test_a_ladder_ends_with_the_whole_prompt(prompts):
    patterns = ladder([mj.VerticalSlash(vertical_size=500, slash_size=1500)], HEADS, LENGTH, 3)
    assert patterns.kind.shape == (3, HEADS)
    assert (np.diff(np.asarray(patterns.slash_size), axis=0) > 0).all()
    assert (patterns.slash_size[-1] == LENGTH).all()


def test_a_map_shows_attention_and_what_is_visited(prompts):
    q, k, weights = prompts[0]
    pattern = mj.VerticalSlash(vertical_size=20, slash_size=30, sink_size=2, window_size=20)
    patterns = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=HEADS)
    build = functools.partial(mj.build_index, block_q=32, block_kv=16, last_q=64, stagger=True)
    index = jax.jit(build)(jax.tree.map(lambda x: x[0], patterns), q, k)
    to_mask = jax.jit(lambda index: index.to_mask(LENGTH, LENGTH)[0])
    without = dataclasses.replace(index, column_count=jnp.zeros_like(index.column_count))
    both, tiles = (np.asarray(to_mask(x)) for x in (index, without))
    step, cells, causal = 7, 43, causal_mask(LENGTH, LENGTH)
    cell = np.arange(LENGTH) // step
    for head in (0, 3):
        got = head_map(q, k, index, jnp.int32(head), step=step)

        def summed(values):
            total = np.zeros((cells, cells))
            np.add.at(total, (cell[:, None], cell[None, :]), values)
            return total

        possible = np.maximum(summed(causal), 1)
        attention_cells = summed(weights[head]) / np.bincount(cell)[:, None]
        np.testing.assert_allclose(got.attention, attention_cells, atol=1e-5)
        np.testing.assert_allclose(got.tiles, summed(tiles[head]) / possible, atol=1e-6)
        columns = both[head] & ~tiles[head]
        assert columns.any()
        np.testing.assert_allclose(got.columns, summed(columns) / possible, atol=1e-6)
        want = (weights[head] * both[head]).sum() / LENGTH
        np.testing.assert_allclose(got.recall, want, atol=1e-5)


def test_decoding_keeps_what_is_chosen_at_each_step_or_once(prompts):
    q, k, weights = prompts[0]
    steps, last_q, ks = 140, 9, (3, 50, 160)
    prompt = LENGTH - steps
    got = np.stack(decoding_kept(q, k, steps=steps, ks=ks, last_q=last_q), axis=-1)
    for head in range(HEADS):
        once = weights[head, prompt - last_q : prompt, :prompt].sum(axis=0)
        for at, size in enumerate(ks):
            fixed = heaviest(once, size)
            for step in (0, 77, 139):
                row = weights[head, prompt + step]
                each, static, common = kept_by(row, heaviest(row[:prompt], size), fixed)
                new = row[prompt:].sum()
                np.testing.assert_allclose(
                    got[head, step, at], [new + each, new + static, common], atol=1e-5
                )


def test_analyses_stream():
    # All weights would be 604 MB for each head.
    length = 3 * 2**12
    arrays = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    bytes_of = lambda lowered: lowered.compile().memory_analysis().temp_size_in_bytes
    assert bytes_of(column_mass.lower(arrays, arrays)) < 60e6
    index = jax.eval_shape(
        lambda: mj.index.dense_index(1, 2, length, length, block_q=128, block_kv=128)
    )
    head = jax.ShapeDtypeStruct((), jnp.int32)
    assert bytes_of(head_map.lower(arrays, arrays, index, head, step=96)) < 60e6


def test_distribution_counts_every_head():
    lines, blocks = (
        mj.VerticalSlash(vertical_size=1000, slash_size=6096),
        mj.BlockSparse(num_blocks=9),
    )
    labels, number = distribution(mj.HeadPatterns.from_grid([[blocks, lines], [lines, lines]]))
    assert labels == ["vertical_slash 1000:6096", "block_sparse 9"]
    assert number.tolist() == [[1, 0], [0, 0]]


@pytest.fixture
def inputs(tiny_model, tmp_path):
    """A model, a text of 300 tokens and a folder, as arguments."""
    words = np.random.default_rng(0).integers(3, 60, (40, 20))
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(" ".join(f"t{word}" for word in row) for row in words))
    model = ["--model", tiny_model, "--rope-scaling", "linear:8"]
    return [*model, "--text", str(book), "--length", "300", "--output", str(tmp_path / "out")]


@pytest.fixture
def run(inputs, tmp_path):
    """Runs an analysis; returns the record's result and the pictures' names."""

    def run(name, *argv):
        assert main(["patterns", name, *inputs, *argv]) == 0
        [record] = read_records(tmp_path / "out" / "record.jsonl", kind=f"patterns {name}")
        pictures = sorted((tmp_path / "out").glob("*.png"))
        for path in pictures:
            pixels = imread(path)[..., :3]
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        return record["result"], [path.name for path in pictures]

    return run


def test_coverage_command(run, capsys):
    result, pictures = run("coverage", "--shares", "0.1", "1.0", "--map-share", "0.1")
    assert (result["length"], result["layers"], result["ks"]) == (300, [0, 1], [30, 300])
    for kept in (result["columns"], result["rows"]):
        assert kept["own"][1] == pytest.approx(1.0, abs=1e-5)
        assert 0 < kept["other"][0] < kept["own"][0] < 1
        assert np.shape(kept["own_by_head"]) == (2, 4, 2)
    assert pictures == ["coverage.png", "coverage_columns.png", "coverage_rows.png"]
    assert "other" in capsys.readouterr().out


def test_recall_command(run):
    result, pictures = run("recall", "--steps", "2", "--layers", "1", "--rows", "20")
    for name in ("a_shape", "vertical_slash", "block_sparse", "top_k"):
        assert result[name]["recall"][-1] == pytest.approx(1.0, abs=1e-5)
        assert result[name]["visited"][-1] == pytest.approx(1.0)
    assert pictures == ["recall.png"]


def test_maps_command(run):
    sizes = ["--attention", "a_shape", "--sink-size", "8", "--window-size", "30"]
    result, pictures = run("maps", "--heads", "1", "3", "1", "0", "--prompts", "2", *sizes)
    assert [row["head"] for row in result["heads"]] == [0, 3]
    assert all(len(row["recall"]) == 2 for row in result["heads"])
    assert pictures == ["map_layer1_head0.png", "map_layer1_head3.png"]


def test_maps_of_the_recommended_attention(run):
    result, pictures = run("maps", "--heads", "1", "3")
    [head] = result["heads"]
    assert head["pattern"] == "minference"
    # At 300 tokens its columns would cost more than all keys, so it visits them.
    assert (head["visited"], head["recall"]) == ([1.0], [pytest.approx(1.0, abs=1e-5)])
    assert pictures == ["map_layer1_head3.png"]


def test_sparsity_command(run):
    small = ["--vertical-slash", "2", "120", "--a-shape", "2", "16", "--block-sparse", "2"]
    result, pictures = run(
        "sparsity", "--lengths", "128", "300", "--layers", "0", "--rows", "90", *small
    )
    assert result["lengths"] == [128, 300]
    assert result["patterns"][0] == "a_shape 2:16"
    assert result["executed"][0][2] == 1.0
    assert result["visited"][1][2] < 1.0
    assert pictures == ["sparsity.png"]


def test_decoding_command(run):
    result, pictures = run("decoding", "--steps", "40", "--shares", "0.1", "1.0")
    assert (result["prompt"], result["ks"]) == (260, [26, 260])
    assert np.shape(result["static"]) == (16, 2)
    np.testing.assert_allclose(np.array(result["static"])[:, 1], 1.0, atol=1e-5)
    assert (np.array(result["static"])[:, 0] < np.array(result["dynamic"])[:, 0]).all()
    assert pictures == ["decoding.png"]


def test_all_analyses_share_one_model(inputs, monkeypatch):
    given = []

    def opened(self, model):
        # Loading again would fail.
        same, tokens = self.open(model, prompts=self.calibration.prompts)
        given.append((type(self).__name__, len(tokens), same))

    names = ("Maps", "Coverage", "Recall", "Sparsity", "Decoding")
    for name in names:
        monkeypatch.setattr(getattr(all_command, name), "run", opened)
    monkeypatch.delattr(options, "load")
    assert main(["patterns", "all", *inputs, "--steps", "40", "--heads", "0", "3"]) == 0
    assert [entry[:2] for entry in given] == [(x, 2 if x == "Coverage" else 1) for x in names]
    assert len({id(entry[2]) for entry in given}) == 1


def test_distribution_command(tmp_path, capsys):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps([{"0": ["vertical_and_slash", 30, 100, 1]}] * 2))
    argv = ["--patterns", str(path), "--output", str(tmp_path / "out")]
    assert main(["patterns", "distribution", *argv]) == 0
    [record] = read_records(tmp_path / "out" / "record.jsonl")
    [row] = record["result"]["patterns"]
    assert (row["heads"], row["by_layer"]) == (2, [1, 1])
    assert "vertical_slash 30:100" in capsys.readouterr().out
    assert (tmp_path / "out" / "distribution_heads.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(
            ["coverage", "--prompts", "1"], "must make 2 prompts here, got 1", id="prompts"
        ),
        pytest.param(["coverage", "--shares", "0"], "above 0 and at most 1", id="share"),
        pytest.param(["coverage", "--map-share", "0.3"], "one of --shares", id="map-share"),
        pytest.param(["recall", "--steps", "1"], "at least 2, got 1", id="steps"),
        pytest.param(["recall", "--layers", "-1"], "at least 0, got -1", id="layer"),
        pytest.param(["recall", "--rows", "0"], "at least 1, got 0", id="rows"),
        pytest.param(["recall", "--text", "none.txt"], "cannot read none.txt", id="text"),
        pytest.param(["maps", "--heads", "0", "-2"], "LAYER HEAD", id="head"),
        pytest.param(["maps", "--heads", "0", "1", "--layers", "2"], "does not apply", id="both"),
        pytest.param(["sparsity", "--lengths", "9000"], "1 to --length 4096", id="length"),
        pytest.param(["sparsity", "--block-sparse", "0"], "num_blocks", id="budget"),
        pytest.param(["decoding", "--steps", "3000"], "half of --length 4096", id="decoded"),
        pytest.param(["decoding", "--output", "file/x"], "cannot write", id="output"),
    ],
)
def test_options_that_cannot_work_are_told_before_the_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["patterns", argv[0], "--model", "no/such/model", *argv[1:]]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(
            ["coverage", "--layers", "2", "--length", "100"], "must be below 2", id="layer"
        ),
        pytest.param(
            ["maps", "--heads", "0", "4", "--length", "100"], "2 layers and 4 heads", id="head"
        ),
        pytest.param(["recall", "--length", "129"], "129 tokens do not fit", id="context"),
    ],
)
def test_what_the_model_does_not_have(capsys, tiny_model, tmp_path, argv, words):
    inputs = ["--model", tiny_model, "--length", "40", "--output", str(tmp_path)]
    assert main(["patterns", argv[0], *inputs, "--tasks", "book", *argv[1:]]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_distribution_of_no_pattern_file(capsys, tmp_path):
    (tmp_path / "x.json").write_text("{")
    for name, words in (("x.json", "not a JSON file"), ("y.json", "no pattern file")):
        assert main(["patterns", "distribution", "--patterns", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
