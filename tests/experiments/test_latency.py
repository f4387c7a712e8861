"""`minference latency`: every part is timed, peers are named, inputs have structure."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.latency.inputs import structured_qkv

SMALL = ["latency", "--layer", "smollm2-135m", "--dtype", "float32", "--repeats", "2"]


def test_layer_is_timed_recorded_and_drawn(tmp_path, capsys):
    record = tmp_path / "latency.jsonl"
    arguments = ["--lengths", "200", "300", "--attention", "a_shape", "--window-size", "64"]
    outputs = ["--plot", str(tmp_path), "--record", str(record)]
    assert main([*SMALL, *arguments, "--sink-size", "8", *outputs]) == 0
    assert "300" in capsys.readouterr().out
    assert (tmp_path / "latency.png").stat().st_size > 5000
    (entry,) = read_records(record, kind="latency")
    first, second = entry["result"]["lengths"]
    assert (first["length"], second["length"]) == (200, 300)
    assert 0 < second["density"] <= 1
    for part in ("sparse", "index", "attention", "dense"):
        assert second[part] == pytest.approx(np.median(second["runs"][part]))
        assert second[part] > 0
    assert len(second["peers"]["jax.nn"]["seconds"]) == 2
    assert second["peers"]["tokamax"]["skipped"] == "tokamax is not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--attention", "dense"], "choose a sparse"),
        (["--patterns", "nowhere.json"], "no pattern file at nowhere.json"),
    ],
    ids=["length", "repeats", "dense", "missing-patterns"],
)
def test_bad_options_are_explained(arguments, message, capsys):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inputs_have_columns_and_a_local_band():
    q, k, v = structured_qkv(
        length=512, num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.dtype("float32"), seed=0
    )
    assert (q.shape, k.shape, v.shape) == ((1, 512, 4, 64), (1, 512, 2, 64), (1, 512, 2, 64))
    scores = np.einsum("qd,kd->qk", q[0, :, 0], k[0, :, 0])
    near = np.mean([scores[i, i] for i in range(512)])
    far = np.mean([scores[i, i - 200] for i in range(200, 512)])
    assert near > far + 3 * np.std(scores) / 10
