"""The benchmark's command line, on a CPU and at a tiny size, and what it measures with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench
from pallas_kernels.block_sparse_attention import measure, workloads
from pallas_kernels.block_sparse_attention.index import NO_TILE
from pallas_kernels.common import timing

_TINY = "--lengths 300 --heads 2 --kv-heads 1 --head-dim 16 --peer none --implementation xla"


def test_bench_writes_one_record_for_each_workload(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    arguments = ["--spreads", "scattered", "--only", "lines-500", "--block-kv", "64"]
    bench.main([*_TINY.split(), *arguments, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["name"] for r in records] == ["lines-500-700-scattered-kv64"]
    assert all(r["error"] < 0.01 and r["ms"] > 0 and 0 < r["density"] <= 1 for r in records)
    assert capsys.readouterr().out.count("TFLOP/s") == 1


def test_bench_refuses_a_wrong_kernel(monkeypatch):
    right = measure.block_sparse_attention
    monkeypatch.setattr(
        measure, "block_sparse_attention", lambda *args, **kwargs: 1.1 * right(*args, **kwargs)
    )
    with pytest.raises(SystemExit, match="wrong"):
        bench.main([*_TINY.split(), "--only", "dense"])


def test_gate_counts_exactly_and_sees_one_wrong_row():
    heads, kv_len = 4, 300  # the last query tile is ragged
    index = workloads.vertical_slash_index(
        1, heads, kv_len, kv_len, vertical=20, slash=6, spread="clustered", staggered=True,
        block_q=64, block_kv=32,
    )  # fmt: skip
    q, k, v = measure.random_qkv(jax.random.key(1), kv_len, heads, 2, 16, "float32")
    mask = np.asarray(jax.jit(lambda index: index.to_mask(kv_len, kv_len))(index))
    scores = np.einsum("qhd,khd->hqk", q[0], np.repeat(k[0], 2, axis=1)) / 4
    weights = np.exp(np.where(mask[0], scores, -np.inf))
    weights /= weights.sum(axis=2, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, np.repeat(v[0], 2, axis=1))[None]
    gate = jax.jit(measure.gate)
    error, density = gate(jnp.asarray(out, jnp.float32), q, k, v, index)
    assert error < 1e-5
    np.testing.assert_allclose(density, mask.sum() / heads / (kv_len * (kv_len + 1) / 2), rtol=1e-6)
    out[0, kv_len - 1, heads - 1] *= 1.2  # in a sampled tile, the ragged one
    assert gate(jnp.asarray(out, jnp.float32), q, k, v, index)[0] > measure.TOLERANCE


def test_shared_shapes_fill_up_what_is_never_read():
    make = lambda slash: workloads.vertical_slash_index(
        1, 2, 256, 256, vertical=20, slash=slash, spread="scattered", staggered=True, block_q=64,
        block_kv=32,
    )  # fmt: skip
    dense = workloads.dense_index(1, 2, 256, 256, block_q=64, block_kv=32)
    before = [make(3), make(40), dense]
    larger = dataclasses.replace(make(3), entries=jnp.zeros((1, 2, 50), jnp.int32))
    after = measure.share_shapes(before, like=(larger,))
    assert [x.entries.shape[2] for x in after] == [50, 50, dense.entries.shape[2]]
    assert [x.columns.shape[2] for x in after] == [32, 32, 0]  # one tile of columns, and none
    for one, other in zip(before, after, strict=True):
        used, width = one.entries.shape[2], one.columns.shape[2]
        np.testing.assert_array_equal(other.entries[:, :, :used], one.entries)
        assert (other.entries[:, :, used:] == NO_TILE).all()
        np.testing.assert_array_equal(other.columns[:, :, :width], one.columns)
        unchanged = dataclasses.replace(other, entries=one.entries, columns=one.columns)
        jax.tree.map(np.testing.assert_array_equal, unchanged, one)


def test_programs_are_compiled_once_for_each_shape():
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    programs = timing.Programs()
    for size in (3, 3, 4):
        programs.add("double", double, jnp.ones(size))
    programs.compile()
    assert sorted(traced) == [(3,), (4,)]
    np.testing.assert_array_equal(programs.get("double", jnp.ones(3))(jnp.full(3, 5.0)), 10.0)
    with pytest.raises(KeyError):
        programs.get("double", jnp.ones(5))


def test_first_result_is_checked_before_anything_is_timed(monkeypatch):
    calls = []

    def call(x):
        calls.append(x)
        return x

    def refuse(result):
        assert (calls, result) == ([7], 7)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        timing.time_calls(call, 7, check=refuse, wait=lambda x: x)
    assert calls == [7]
    assert len(timing.time_calls(call, 7, wait=lambda x: x)) == 5
    monkeypatch.setattr(timing, "_LONG", 0.0)
    calls.clear()
    assert len(timing.time_calls(call, 7, wait=lambda x: x)) == len(calls) == 1
