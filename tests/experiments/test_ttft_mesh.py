"""`minference ttft --mesh`: rows of several devices beside those of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import minference_jax as mj
from experiments.__main__ import main
from experiments.common.record import append_record, read_records
from experiments.ttft.digest import agreement, digest_of
from experiments.ttft.prescribed import Densities
from experiments.ttft.rows import KIND, read_rows
from experiments.ttft.subject import of_shape
from experiments.ttft.table import as_one_device, base_of, efficiency, markdown, on_one_device
from minference_jax.sharding import attention_mesh, padded_length
from tests.experiments.test_ttft import POINT, ROW, TINY, tiny_shape

__all__ = ["tiny_shape"]
ON_TWO = dataclasses.replace(POINT, mesh="tp=2")


def test_a_mesh_reads_what_one_device_reads(tiny_shape, tmp_path):
    # 6 query tiles, the last one cut, are 8 on devices that share the prompt.
    length, label, record = 700, "threshold:0.1", tmp_path / "ttft.jsonl"
    told = np.random.default_rng(0).integers(1, 7, (3, 4, 6))
    Densities(folder=tmp_path).write(label, length, told, "made up")
    common = ["ttft", "--shape", "smollm2-135m", "--lengths", str(length), "--record", str(record)]
    common += ["--densities", str(tmp_path), "--dense-layers", "1", "--kv-cache", "int8"]
    common += ["--repeats", "1", "--part-layers", "0", "--methods", label]
    assert padded_length(length, 2) == 1024
    for more in ([], ["dense:reference", "--mesh", "cp=2,tp=2"]):
        assert main([*common, *more]) == 0
    one, four, dense = read_records(record, kind=KIND)
    assert [x["config"]["mesh"] for x in (one, four, dense)] == [None, "tp=2,cp=2", "tp=2,cp=2"]
    one, four, dense = (x["result"] for x in (one, four, dense))
    assert (one["devices"], four["devices"]) == (1, 4)
    assert four["executed_share"] == one["executed_share"]
    assert 0.3 < four["executed_share"] < 0.9
    assert four["estimate_bytes"] < one["estimate_bytes"]
    same, apart = agreement(one["digest"], four["digest"])
    assert same
    assert apart < 1e-5
    assert dense["seconds"] > dense["runs"][0]  # of three layers
    assert dense["executed_share"] == 1.0
    assert "parts" not in dense
    assert f"| 700 | {label} | tp=2,cp=2 |" in markdown(read_rows(record))


def test_weights_of_a_shape_are_made_where_they_lie(tiny_shape):
    how = {"dtype": jnp.dtype("float32"), "longest": 100, "seed": 3}
    four = of_shape(
        "smollm2-135m", **how, console=Console(quiet=True), mesh=attention_mesh(heads=4)
    )
    up = four.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert up.addressable_shards[0].data.shape == (3, TINY.embed_dim, TINY.hidden_dim // 4)


def test_rows_of_several_devices_are_compared_with_those_of_one(tmp_path):
    record, logits = tmp_path / "ttft.jsonl", np.random.default_rng(0).normal(size=50)
    near, other = (digest_of(logits + x) for x in (0.001, -2 * logits))
    append = lambda point, **row: append_record(
        record, kind=KIND, argv=["test"], config=point, result={**ROW, **row}
    )
    append(dataclasses.replace(POINT, timed_layers=2), seconds=9.0, digest=other)
    append(POINT, digest=digest_of(logits))
    append(dataclasses.replace(POINT, kv_cache=("int8",)), seconds=7.0, digest=other)
    append(ON_TWO, seconds=5.0, digest=near)
    sparse = dataclasses.replace(ON_TWO, method="minference")
    append(sparse, seconds=2.5, digest=near)
    rows = read_rows(record)
    # As many layers and the same cache come first.
    assert on_one_device(rows, ON_TWO) == POINT
    assert on_one_device(rows, POINT) is None
    assert efficiency(rows, ON_TWO) == 8.0 / (2 * 5.0)
    assert as_one_device(rows, ON_TWO) == (True, pytest.approx(0.001 / logits.std(), rel=1e-3))
    assert efficiency(rows, sparse) is None
    assert base_of(rows, sparse) == rows.figures[ON_TWO]
    # The first layers alone give another result, and take another time.
    few = dataclasses.replace(ON_TWO, timed_layers=3)
    append(few, seconds=4.0, digest=near)
    assert as_one_device(read_rows(record), few) is None
    assert agreement(digest_of(logits), other)[0] is False
    assert "| 1K | dense | tp=2 | 80% | yes (" in markdown(rows)


def test_dense_attention_without_an_index_runs_on_each_device():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Whole:
        def __call__(self, q, k, v, *, lengths=None, q_offset=None):
            assert (q.shape[2], k.shape[2], q_offset) == (2, 1, None) or q.shape[2] == 4
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    q, k, v = (jax.random.normal(jax.random.key(n), (1, 20, n, 8)) for n in (4, 2, 2))
    sharded = mj.ShardedAttention(Whole(), attention_mesh(heads=2))
    out, executed = jax.jit(sharded.attend_executed)(q, k, v)
    assert executed is None
    np.testing.assert_allclose(out, Whole()(q, k, v), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "tp=2,cp=2", "--chunk-size", "64"], "leave out --chunk-size, or take tp"),
        (["--mesh", "tp=3"], "split it over 1 or 2 or 4"),
        (["--mesh", "tp=8"], "there are 4"),
        (["--mesh", "cp=2", "--methods", "flexprefill:0.95"], "FlexPrefill decides for a query"),
        (["--mesh", "tp=4", "--methods", "inf_llm:1024"], "take at most tp=2"),
    ],
)
def test_what_cannot_be_split_is_told_before_weights_are_made(
    arguments, message, tiny_shape, capsys
):
    assert main(["ttft", "--shape", "smollm2-135m", "--lengths", "100", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "random weights" not in error
