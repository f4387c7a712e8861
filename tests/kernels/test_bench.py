"""The benchmark's command line, on a CPU and at a tiny size."""

import json

import pytest

from pallas_kernels import bench

_TINY = "--lengths 384 --heads 2 --kv-heads 1 --head-dim 16 --peer none --implementation xla"


def test_bench_writes_one_record_for_each_workload(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    bench.main([*_TINY.split(), "--spreads", "clustered", "--only", "lines-500", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["name"] for r in records] == [
        "lines-500-700-clustered-staggered",
        "lines-500-700-clustered-plain",
    ]
    assert all(r["error"] < 0.01 and r["ms"] > 0 and 0 < r["density"] <= 1 for r in records)
    assert capsys.readouterr().out.count("TFLOP/s") == 2


def test_bench_refuses_a_wrong_kernel(monkeypatch):
    right = bench.block_sparse_attention
    monkeypatch.setattr(
        bench, "block_sparse_attention", lambda *args, **kwargs: 1.1 * right(*args, **kwargs)
    )
    with pytest.raises(SystemExit, match="wrong"):
        bench.main([*_TINY.split(), "--only", "dense"])
