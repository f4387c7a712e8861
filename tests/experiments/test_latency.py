"""`minference latency`: rows are measured, kept, resumed, judged and drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.common.record import append_record, environment, read_records
from experiments.latency import command
from experiments.latency.inputs import structured_qkv
from experiments.latency.layer import table_layers
from experiments.latency.rows import Point, read_rows
from experiments.latency.table import aims_markdown, rows_markdown
from pallas_kernels.bench import workloads
from pallas_kernels.block_sparse_attention.measure import WrongResult

SMALL = ["latency", "--layer", "smollm2-135m", "--dtype", "float32", "--lengths", "200"]
POINT = {"layer": "llama3-8b", "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}


def row(path, level, name, length, ms, **figures):
    point = Point(level=level, name=name, length=length, seed=0, **POINT)
    figures = {"ms": ms, "tflops": 500.0, **figures}
    append_record(path, kind="latency", argv=["test"], config=point, result=figures)


def test_layer_is_timed_resumed_and_drawn(tmp_path, capsys):
    record = tmp_path / "latency.jsonl"
    arguments = ["--attention", "a_shape", "--window-size", "64", "--sink-size", "8"]
    arguments = [*SMALL, *arguments, "--record", str(record)]
    assert main([*arguments, "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "latency.png").stat().st_size > 5000
    assert (tmp_path / "latency-split.png").stat().st_size > 5000
    assert "a_shape (sink_size=8, window_size=64)" in (tmp_path / "latency.md").read_text()
    entries = read_records(record, kind="latency")
    peer, dense, layer = (entry["result"] for entry in entries)
    assert [entry["config"]["level"] for entry in entries] == ["peer", "kernel", "layer"]
    assert dense["density"] == 1.0
    assert 0 < layer["density"] <= 1
    assert layer["speedup"] == pytest.approx(peer["ms"] / layer["ms"])
    assert dense["rate_ratio"] == pytest.approx(dense["tflops"] / peer["tflops"])
    assert all(layer[f"{part}_ms"] > 0 for part in ("kernel", "index", "plan", "gather"))
    assert "estimation_ms" not in layer  # windows are not searched for
    assert "torch is not installed" in capsys.readouterr().out
    assert main(arguments) == 0
    assert len(read_records(record)) == 3


def test_stopped_run_keeps_its_rows_and_is_taken_up(tmp_path, monkeypatch):
    record = tmp_path / "latency.jsonl"
    seen = []

    def measure(suite, length, done, known, console):
        seen.append(set(done))
        for name in ("dense", "a_shape-128-1024"):
            point = suite.point("kernel", name, length)
            if point not in done:
                yield point, {"ms": 1.0, "tflops": 2.0}
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_length", measure)
    arguments = [*SMALL, "--suite", "table", "--record", str(record)]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    names = [entry["config"]["name"] for entry in read_records(record)]
    assert names == ["dense", "a_shape-128-1024"]
    assert [{point.name for point in done} for done in seen] == [set(), {"dense"}]


def test_wrong_result_gives_no_row_and_an_error(tmp_path, monkeypatch):
    record = tmp_path / "latency.jsonl"

    def measure(suite, length, done, known, console):
        yield suite.point("kernel", "dense", length), {"wrong": "off by 1"}
        yield suite.point("kernel", "blocks-100", length), {"ms": 1.0, "tflops": 2.0}

    monkeypatch.setattr(command, "measure_length", measure)
    with pytest.raises(WrongResult, match="dense, 200 tokens: off by 1"):
        main([*SMALL, "--suite", "table", "--record", str(record)])
    assert [entry["config"]["name"] for entry in read_records(record)] == ["blocks-100"]


def test_rows_of_other_revisions_are_measured_again(tmp_path):
    record = tmp_path / "latency.jsonl"
    row(record, "kernel", "dense", 1024, 2.0)
    row(record, "kernel", "dense", 1024, 3.0)
    here = environment(["test"])
    assert [r["ms"] for r in read_rows(record, like=here).figures.values()] == [3.0]
    assert read_rows(record, like=here | {"git": "another"}).figures == {}
    assert read_rows(record, like=here | {"device": "another"}).figures == {}
    assert len(read_rows(record).environments) == 1


def test_aims_are_judged_by_the_worst_measurement(tmp_path):
    record = tmp_path / "latency.jsonl"
    k128, m1 = 131072, 1048576
    row(record, "peer", "cudnn", k128, 250.0)
    row(record, "kernel", "dense", k128, 220.0, rate_ratio=1.10)
    row(record, "kernel", "blocks-100", k128, 22.0, rate_ratio=1.06)
    row(record, "kernel", "lines-1000-6096-clustered", k128, 80.0, rate_ratio=0.95)
    row(record, "kernel", "lines-3500-100-clustered", 8192, 80.0, rate_ratio=0.1)  # too short
    split = {"kernel_ms": 95.0, "plan_ms": 4.0, "gather_ms": 1.0}
    row(record, "layer", "lines-1000-6096", k128, 100.0, **split)
    row(record, "layer", "a_shape-128-1024", k128, 242.0)
    row(record, "layer", "lines-500-700", m1, 9.0, index_bytes_per_head=2_000_000)
    visited = {
        "length": 16384,
        "budgets": {
            "500-700": {"original": {"visited": 0.3}, "ours": {"96": {"visited_ratio": 1.2}}},
            "100-800": {"original": {"visited": 0.95}, "ours": {"96": {"visited_ratio": 1.9}}},
        },
    }
    lines = aims_markdown(read_rows(record), [visited]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    verdicts = {what: (measured, verdict) for what, _, _, measured, verdict in cells}
    find = lambda words: next(v for what, v in verdicts.items() if words in what)
    assert find("rate over tiles") == (
        "0.95x (lines-1000-6096-clustered, 128K); best 1.06x (blocks-100, 128K)", "floor met",
    )  # fmt: skip
    assert find("dense through") == ("1.10x (128K)", "aim met")
    assert find("over its attention kernel") == ("1.11x (lines-1000-6096, 128K)", "missed")
    assert find("clustered, 128K") == ("80.0 ms (llama3-8b)", "floor met")
    assert find("clustered, 1M") == ("not measured", "")
    assert find("lines of real heads")[1] == "floor met"
    worst = "0.97x (a_shape-128-1024, 128K); best 0.40x (lines-1000-6096, 128K)"
    assert find("layer over cuDNN dense") == (worst, "aim met")
    worst = "1.10x (a_shape-128-1024, 128K); best 0.45x (lines-1000-6096, 128K)"
    assert find("layer over dense through") == (worst, "missed")
    assert find("index memory") == ("2000 KB (lines-500-700)", "missed")
    assert rows_markdown(read_rows(record)).count("\n") == 1 + 8


def test_render_draws_a_record_without_measuring(tmp_path, capsys):
    record = tmp_path / "latency.jsonl"
    row(record, "peer", "cudnn", 8192, 1.0)
    row(record, "kernel", "dense", 8192, 0.9, speedup=1.1)
    row(record, "kernel", "lines-500-700-scattered", 8192, 0.5, speedup=2.0)
    arguments = ["latency", "--suite", "table", "--render", "--record", str(record)]
    assert main([*arguments, "--plot", str(tmp_path)]) == 0
    assert "| 8,192 | kernel | lines-500-700-scattered |" in capsys.readouterr().out
    assert (tmp_path / "latency.png").stat().st_size > 5000
    assert not (tmp_path / "latency-split.png").exists()  # no layer was split
    assert len(read_records(record)) == 3


def test_table_has_every_spread_and_layers_share_capacities():
    names = [w.name for w in workloads(["contiguous", "scattered"], [96, 128])]
    assert len(names) == len(set(names)) == 2 + 2 * 3 * 2 + 1
    cases = {case.name: case.attention.patterns for case in table_layers(4, None)}
    capacities = {patterns.max_columns for patterns in cases.values()}
    assert capacities == {0, 1024, 3584}
    assert cases["lines-500-700"].slash_size[0] == 700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "at least 1"),
        (["--attention", "dense"], "choose a sparse"),
        (["--patterns", "nowhere.json"], "no pattern file at nowhere.json"),
        (["--only", "dense"], "belong to --suite table"),
        (["--render"], "name its file with --record"),
        (["--suite", "table", "--lines", "nowhere.npz"], "nowhere.npz"),
    ],
    ids=["length", "dense", "missing-patterns", "only", "render", "lines"],
)
def test_bad_options_are_explained(arguments, message, capsys):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inputs_have_columns_and_a_local_band():
    sizes = {"length": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    draw = functools.partial(structured_qkv, dtype=jnp.dtype("float32"), **sizes)
    q, k, v = map(np.asarray, jax.jit(draw)(jax.random.key(0)))
    assert (q.shape, k.shape, v.shape) == ((1, 512, 4, 64), (1, 512, 2, 64), (1, 512, 2, 64))
    assert not np.allclose(q[:, :, 0], q[:, :, 2])
    for head in range(4):
        scores = np.einsum("qd,kd->qk", q[0, :, head], k[0, :, head // 2])
        near = np.mean([scores[i, i] for i in range(512)])
        far = np.mean([scores[i, i - 200] for i in range(200, 512)])
        assert near > far + 3 * np.std(scores) / 10
