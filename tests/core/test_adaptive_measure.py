"""The command that times adaptive estimators, on a CPU and at a tiny size."""

import json

import jax
import jax.numpy as jnp
import pytest

import minference_jax as mj
from minference_jax.adaptive import measure
from minference_jax.search.cost import work_of

_TINY = "--lengths 2048 --heads 2 --kv-heads 1 --head-dim 64"


def refuse(given, q, k):
    raise ValueError("no room")


def test_a_record_for_each_estimator_and_errors_in_theirs(tmp_path, monkeypatch, capsys):
    names = ["dense", "threshold-16"]
    chosen = [case for case in measure.cases(2) if case.name in names]
    chosen.insert(1, measure.Case("refused", refuse))
    monkeypatch.setattr(measure, "cases", lambda heads: chosen)
    path = tmp_path / "cost.jsonl"
    measure.main([*_TINY.split(), "--output", str(path)])
    dense, refused, threshold = (json.loads(line) for line in path.read_text().splitlines())
    assert refused["error"] == "ValueError: no room"
    assert "attention_ms" not in refused
    assert dense["executed"] == dense["dense_tiles"] == 1
    together = threshold["estimate_ms"] + threshold["attention_ms"]
    assert threshold["of_dense"] == pytest.approx(together / dense["attention_ms"])
    assert threshold["parameters"]["estimator"]["pooled_rows"] == 16
    # The planted heads go from those that look at many topics to those that look at few.
    shares = threshold["executed_by_head"]
    assert shares[0] > shares[-1]
    assert threshold["executed"] < 0.95
    assert len(capsys.readouterr().out.splitlines()) == 4  # and the environment


def test_columns_of_a_query_tile_that_visits_every_key_cost_nothing():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 128, 1, 8))
    estimator = mj.WithColumns(mj.BlockThreshold(jnp.zeros(1)), 20)
    attention = mj.AdaptiveAttention(estimator, mj.Layout(block_q=16, block_kv=16))
    count = jax.jit(lambda q, k: work_of(attention.estimate(q, k), 128, None, "flops"))
    work = count(q, k)
    assert (work.sparse == work.dense).all()
