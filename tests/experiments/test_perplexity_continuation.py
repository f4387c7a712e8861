"""`minference perplexity --continuation`: against one pass and single steps, resume, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.common.methods import parse_method
from experiments.common.programs import Programs
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines
from experiments.perplexity import measure
from experiments.perplexity.read import Reader
from minference_jax import DenseAttention
from minference_jax.kv_cache import EightBitKV
from models import load_model
from models.common.decoder import decode_step, forward, prefill

LENGTH, LAST = 150, 20
# Beyond the model's 128 tokens its frequencies depend on the length of the whole text.
SCALING = {"rope_type": "dynamic", "factor": 2.0}


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, dtype=jnp.float32, rope_scaling=SCALING)


def words(number, seed=0):
    return " ".join(f"t{i}" for i in np.random.default_rng(seed).integers(3, 60, number))


@pytest.fixture(scope="module")
def programs():
    return Programs()


def step_by_step(model, spec, tokens):
    """Mean of -log probability of the last tokens, each decoded onto the cache."""
    tokens, method = jnp.asarray(tokens)[None], parse_method(spec)
    logits, cache = prefill(
        model.params, tokens[:, :-LAST], config=model.config, capacity=LENGTH,
        attention_fn=method.attention(2, 4), compression=method.compression(2),
        rope_length=jnp.full(1, LENGTH, jnp.int32),
    )  # fmt: skip
    surprises = []
    for token in tokens[0, -LAST:]:
        surprises.append(-float(jax.nn.log_softmax(logits[0])[token]))
        logits, cache = decode_step(model.params, token[None], cache, config=model.config)
    return np.mean(surprises)


def in_one_pass(model, tokens):
    """The same of dense attention, from the logits of all tokens read at once."""
    logits = forward(
        model.params, jnp.asarray(tokens)[None], config=model.config, attention_fn=DenseAttention()
    )
    before = np.asarray(logits, np.float64)[0, -LAST - 1 : -1]
    own = before[np.arange(LAST), tokens[-LAST:]]
    return np.mean(np.log(np.exp(before).sum(axis=1)) - own)


def test_command_scores_what_one_pass_and_single_steps_score(
    tiny_model, model, programs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "Programs", lambda: programs)
    (tmp_path / "text.txt").write_text(words(LENGTH))
    folder = tmp_path / "run"
    argv = ["perplexity", "--model", tiny_model, "--rope-scaling", "dynamic:2"]
    argv += ["--texts", f"{tmp_path}/text.txt", "--lengths", str(LENGTH), "--output", str(folder)]
    eight, few = "dense+int8", "dense+int8:pyramidkv:40"
    argv += ["--methods", "dense", eight, few]
    assert main([*argv, "--continuation", str(LAST)]) == 0
    told = capsys.readouterr().out
    assert f"last {LAST} tokens" in told
    assert "cache, MiB" in told
    records = read_records(folder / "record.jsonl", kind="perplexity")
    found = {one["result"]["method"]: one["result"]["rows"][0] for one in records}
    assert list(found) == ["dense", eight, few]
    tokens = np.asarray(model.tokenizer.encode(words(LENGTH))[:LENGTH])
    dense = found["dense"]
    assert dense["nll"] == pytest.approx(in_one_pass(model, tokens), rel=2e-6)
    assert {row["dense_nll"] for row in found.values()} == {dense["nll"]}
    assert (dense["kl"], dense["top1"], dense["density"]) == (0, 1, 1)
    assert found[few]["nll"] == pytest.approx(step_by_step(model, few, tokens), rel=2e-6)
    assert abs(found[few]["nll"] - dense["nll"]) > 1e-3
    config, sizes = model.config, {spec: row["cache_bytes"] for spec, row in found.items()}
    channels = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert sizes["dense"] == channels * (LENGTH - LAST) * 4
    assert sizes[eight] == channels * (LENGTH - LAST + 4)  # and a scale, 4 bytes
    assert sizes[few] < 0.4 * sizes[eight]
    assert records[1]["result"]["means"][0]["cache_bytes"] == sizes[eight]
    # What a kill leaves is gone on from, with the same continuation only.
    path = folder / few.replace(":", "-") / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert main([*argv, "--continuation", str(LAST)]) == 0
    assert path.read_bytes() == whole
    assert len(read_lines(path)) == 1
    assert main([*argv, "--continuation", "30"]) == 2
    assert "made with continuation = 20, this one has 30" in capsys.readouterr().err


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WrongScales:
    """Keeps 8 bits with other scales than they were stored with."""

    of: Any

    @property
    def capacity(self):
        return self.of.capacity

    @property
    def window(self):
        return self.of.window

    def __call__(self, q, k, v, *, lengths=None, q_start=None):
        kept = self.of(q, k, v, lengths=lengths, q_start=q_start)
        return kept._replace(scales=jax.tree.map(lambda scale: 1.1 * scale, kept.scales))


def test_eight_bits_lose_little_and_wrong_scales_are_seen(model, programs):
    tokens = np.asarray(model.tokenizer.encode(words(LENGTH))[:LENGTH])
    kept = {"right": EightBitKV(), "wrong": WrongScales(EightBitKV())}
    readers = {name: Reader(DenseAttention(), each) for name, each in kept.items()}
    found = dict(measure.measure(model, readers, tokens, programs, LAST))
    assert 0 < found["right"]["kl"] < 0.003
    assert found["wrong"]["kl"] > 10 * found["right"]["kl"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        pytest.param(["--methods", "dense+int8"], "without --continuation (512, say)", id="suffix"),
        pytest.param(
            ["--continuation", "512", "--lengths", "1000", "512"],
            "must be below the shortest of --lengths, prompt and continuation together (512)",
            id="no-prompt",
        ),
        pytest.param(["--continuation", "1"], "at least 2, got 1", id="one-token"),
        pytest.param(
            ["--continuation", "9", "--methods", "dense+snapkv:9"], "a budget of 9", id="budget"
        ),
        # What is kept is chosen from the whole prompt.
        pytest.param(["--continuation", "9", "--chunk-size", "9"], "--chunk-size", id="chunks"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, told
):
    monkeypatch.chdir(tmp_path)
    assert main(["perplexity", "--model", "missing", *argv]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
