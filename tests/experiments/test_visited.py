"""`minference visited`: what the original visits, what ours visits, and the lines it saves."""

import jax
import numpy as np
import pytest

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.latency.lines import real_lines, save_lines
from experiments.visited.count import count_lines
from experiments.visited.original import original_pairs
from tests.core.brute_force import mask_of_lines
from tests.helpers import causal_mask, random_qkv


def serial_mask(columns, distances):
    """The original's conversion, one block of 64 rows and one slash after another."""
    length = len(distances)
    mask, executed = np.zeros((length, length), bool), 0
    for first in range(0, length, 64):
        end = first + 64
        ends = [max(end - s, 64) for s in np.flatnonzero(distances)[::-1] if s < end]
        verticals = list(np.flatnonzero(columns))
        ranges, singles = [], []
        low, high = ends[0] - 64, ends[0]
        del ends[0]
        while True:
            if verticals and verticals[0] < high:
                column = verticals.pop(0)
                if column < low:
                    singles.append(column)
            elif not ends:
                ranges.append((low, high))
                break
            else:
                reach = ends.pop(0)
                if reach > high + 64:
                    ranges.append((low, high))
                    low, high = reach - 64, reach
                elif reach > high:
                    high += 64
        for low, high in ranges:
            mask[first:end, low:high] = True
        mask[first:end, singles] = True
        groups = -(-len(singles) // 64)
        executed += 64 * (sum(high - low for low, high in ranges) + 64 * groups)
    return mask & causal_mask(length, length), executed


def test_original_is_counted_as_its_conversion_would_run():
    rng = np.random.default_rng(0)
    for length in (1, 63, 64, 200, *rng.integers(2, 700, 25)):
        columns = rng.random(length) < rng.choice([0.0, 0.01, 0.1, 0.5])
        distances = rng.random(length) < rng.choice([0.0, 0.005, 0.02, 0.1, 1.0])
        distances[0] = True
        mask, executed = serial_mask(columns, distances)
        assert original_pairs(columns, distances) == (mask.sum(), executed)


def test_original_needs_the_diagonal():
    with pytest.raises(ValueError, match="distance 0"):
        original_pairs(np.zeros(5, bool), np.zeros(5, bool))


def test_ours_is_counted_from_the_tiles_of_the_chosen_lines():
    length, heads = 300, 4
    patterns = mj.HeadPatterns.from_grid(
        [
            [mj.VerticalSlash(vertical_size=size, slash_size=8, sink_size=2, window_size=3)] * heads
            for size in (5, 40)
        ]
    )
    q, k, _ = random_qkv(0, q_len=length)
    counted = jax.jit(lambda q, k: count_lines(patterns, q, k, block_kvs=(64,)))(q, k)
    columns, distances = (np.asarray(counted[kind]) for kind in ("columns", "distances"))
    assert (columns.sum(axis=2).T == [5, 40]).all()
    assert (distances.sum(axis=2) == 8).all()
    visited, executed = counted["pairs"][64]
    for number, head in np.ndindex(2, heads):
        mask = mask_of_lines(
            *(np.flatnonzero(mask[number, head]) for mask in (columns, distances)),
            q_len=length, kv_len=length, offset=0, length=length, block_q=64, block_kv=64,
        )  # fmt: skip
        assert visited[number, head] == mask.sum()
    assert (executed >= visited).all()


def test_budgets_that_cover_everything_visit_everything(tiny_model, tmp_path, capsys):
    text, record = tmp_path / "text.txt", tmp_path / "visited.jsonl"
    text.write_text(" ".join(f"t{3 + i % 50}" for i in range(200)))
    lines = tmp_path / "lines.npz"
    arguments = ["--model", tiny_model, "--text", str(text), "--lengths", "100", "--block-kv", "64"]
    outputs = ["--record", str(record), "--save-lines", str(lines)]
    assert main(["visited", *arguments, "--budgets", "100", "100", *outputs]) == 0
    assert "100, 100" in capsys.readouterr().out
    (entry,) = read_records(record, kind="visited")
    figures = entry["result"]["budgets"]["100-100"]
    assert figures["original"]["visited"] == 1.0
    assert figures["ours"]["64"]["visited"] == pytest.approx(1.0)
    assert figures["ours"]["64"]["visited_ratio"] == pytest.approx(1.0)
    assert len(figures["ours"]["64"]["visited_ratio_by_layer"]) == 2
    [workload] = real_lines(lines, 100, (64,))
    assert workload.name == "lines-100-100-real-kv64"
    assert real_lines(lines, 101, (64,)) == []


def test_saved_lines_are_visited(tmp_path):
    rng = np.random.default_rng(0)
    masks = tuple(rng.random((40, 100)) < share for share in (0.1, 0.03))
    masks[1][:, 0] = True
    save_lines(tmp_path / "lines.npz", 100, {"lines-10-3": masks})
    [workload] = real_lines(tmp_path / "lines.npz", 100, (128,))
    index = workload.build(3, 100)
    mask = np.asarray(jax.jit(lambda index: index.to_mask(100, 100))(index))[0]
    row, key = np.indices((100, 100))
    for number, head in enumerate((0, 1, 2)):  # of 40 heads 32 are kept, the first ones among them
        wanted = masks[0][head][key] | masks[1][head][np.abs(row - key)]
        assert mask[number][wanted & (key <= row)].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "5000"], "has 3 and the model's context"),
        (["--block-kv", "60"], "multiples of 8"),
        (["--budgets", "10", "0"], "slash_size"),
        (["--chunk-size", "10"], "does not apply"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=["length", "block-kv", "budget", "chunks", "text"],
)
def test_bad_options_are_explained(tiny_model, tmp_path, arguments, message, capsys):
    text = tmp_path / "text.txt"
    text.write_text("t3 t4 t5")
    assert main(["visited", "--model", tiny_model, "--text", str(text), *arguments]) == 2
    assert message in capsys.readouterr().err
