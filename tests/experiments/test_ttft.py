"""`minference ttft`: rows, parts, prescribed densities, resuming, and what it says of mistakes."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from experiments.__main__ import main
from experiments.common import shapes
from experiments.common.methods import parse_method
from experiments.common.record import append_record, read_records
from experiments.ttft import parts, whole
from experiments.ttft.attention import CudnnAttention
from experiments.ttft.prescribed import Densities, Prescribed
from experiments.ttft.rows import KIND, Point, read_rows
from experiments.ttft.subject import Subject
from experiments.ttft.table import markdown, speed_up
from minference_jax.pairs import Executed
from models.common.decoder import abstract_params
from pallas_kernels.common import environment
from pallas_kernels.common.timing import Programs
from tests.models.checkpoints import words

TINY = dataclasses.replace(
    shapes.SHAPES["smollm2-135m"](), vocab_size=64, embed_dim=32, hidden_dim=64, num_layers=3,
    num_heads=4, num_kv_heads=2, head_dim=16,
    rope=dataclasses.replace(shapes.SHAPES["smollm2-135m"]().rope, rotary_dim=16),
)  # fmt: skip
POINT = Point(
    model="m", random_weights=False, rope_scaling=None, text="book.txt", length=1024,
    method="dense", sha256=None, densities=None, kv_cache=("all",), chunk_size=None,
    dtype="bfloat16", layers=32, timed_layers=32,
)  # fmt: skip
ROW = {
    "seconds": 8.0, "kv_cache": "all", "peak_bytes": None, "estimate_bytes": 2**30,
    "compile_seconds": 3.0, "distinct_tokens": 500,
}  # fmt: skip


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", lambda: TINY)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(words(np.random.default_rng(0).integers(1, 64, 90)))
    return path


def test_densities_of_a_model_are_prescribed_to_a_shape(tiny_model, tiny_shape, book, tmp_path):
    record, folder = tmp_path / "ttft.jsonl", tmp_path / "densities"
    common = ["--lengths", "120", "--densities", str(folder), "--record", str(record)]
    common += ["--repeats", "1"]
    given = ["ttft", "--model", tiny_model, "--texts", str(book), "--methods", "threshold:0.1"]
    assert main([*given, *common, "--part-layers", "0"]) == 0
    given = ["ttft", "--shape", "smollm2-135m", "--methods", "dense", "threshold:0.1"]
    given += ["--kv-cache", "int8", "--dense-layers", "1", "--plot", str(tmp_path)]
    assert main([*given, *common]) == 0
    real, dense, sparse = read_records(record, kind=KIND)
    assert real["result"]["distinct_tokens"] == 90  # so 30 of the prompt's tokens are repeated
    assert (dense["config"]["timed_layers"], dense["config"]["layers"]) == (1, 3)
    assert sparse["config"]["densities"].startswith("tiny")
    assert sparse["result"]["kv_cache"] == "int8"
    assert "parts" not in real["result"]
    assert set(sparse["result"]["parts"]) == set(parts.PARTS)
    for entry in (dense, sparse):
        result = entry["result"]
        assert sum(result["parts"].values()) == pytest.approx(result["seconds"])
        assert result["seconds"] > result["parts"]["linear"] > 0
        assert result["estimate_bytes"] > 0
        assert result["linear_of_plain"] > 0
    text = (tmp_path / "ttft.md").read_text()
    assert "repeated beyond 90 tokens" in text
    assert "visit as many blocks as the heads of tiny" in text
    assert (tmp_path / "ttft.png").stat().st_size > 5000
    assert (tmp_path / "ttft-parts.png").stat().st_size > 5000
    # Rows that are there are not measured again.
    assert main([*given, *common]) == 0
    assert len(read_records(record, kind=KIND)) == 3


def test_prescribed_heads_visit_exactly_what_they_are_told(tmp_path):
    length, block, layers, heads = 1000, 128, 3, 4
    tiles = -(-length // block)
    rng = np.random.default_rng(0)
    told = rng.integers(1, tiles + 1, (2, 2, tiles))
    Densities(folder=tmp_path).write("hybrid:0.1,512", length, told, "another")
    layout = mj.Layout(max_blocks=3)
    columns = mj.WithColumns(mj.BlockThreshold(0.1), 0, max_columns=1)
    attention = mj.AdaptiveAttention(columns, layout, dense_above=None).for_layers(layers)
    given, source = Densities(folder=tmp_path).prescribe(
        parse_method("minference"), attention, length, layers=layers, heads=heads, head_dim=16
    )
    assert source.startswith("another")
    assert isinstance(given.estimator.blocks, Prescribed)
    q, k = (
        jax.random.normal(jax.random.key(at), (1, length, n, 16)) for at, n in enumerate((heads, 2))
    )
    visit = jax.jit(lambda own: own.estimate(q, k).to_mask(length, length))
    # Layers 0, 1, 2 of three are nearest to 0, 1, 1 of two; two heads share one of two.
    for layer, nearest in enumerate((0, 1, 1)):
        mask = np.asarray(visit(given.layer(layer)))[0]
        for head in range(heads):
            for tile in range(tiles):
                rows = mask[head, tile * block : (tile + 1) * block]
                last = min((tile + 1) * block, length)
                visited = rows[-1, :last].reshape(1, -1)[0]
                found = len({key // block for key in np.flatnonzero(visited)})
                wanted = min(told[nearest, head // 2, tile], tile + 1)
                # Lists hold three; a tile that needs more visits every key.
                assert found == (wanted if wanted <= 3 else tile + 1)
                assert rows[-1, last - 1]


def test_executed_pairs_are_those_of_the_lists():
    count = np.array([[[[1, 2, 3]]], [[[1, 1, 2]]]])  # layers, batch, heads, tiles
    executed = Executed(count, np.array([[[10]], [[0]]]), np.full(2, 128), np.full(2, 128))
    # Columns of tiles whose key tiles are not all: none in layer 0, none are there in layer 1.
    assert whole.executed_pairs(executed, 384).tolist() == [6 * 128 * 128, 4 * 128 * 128]
    assert whole.executed_share(executed, 384) == pytest.approx((6 + 4) / 2 / 6)
    # Of a prompt in two chunks, the second of which is shorter.
    chunks = lambda leaf: np.repeat(leaf[:, None], 2, axis=1)
    found = whole.counts_of(jax.tree.map(chunks, executed), 5 * 128)
    assert found.tolist() == [[[1, 2, 3, 1, 2]], [[1, 1, 2, 1, 1]]]


def test_extrapolation_counts_the_ends_once():
    assert parts.extrapolate(5.0, 1.0, timed=2, layers=8) == 1.0 + 4 * 4.0


def test_programs_of_the_8b_at_a_million_tokens_lower_for_cuda(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind="H200", compute_capability="9.0")
    monkeypatch.setattr(environment, "_device", lambda: device)
    monkeypatch.setattr(whole, "device_memory", lambda: 132 * 2**30)  # 0.95 of an H200
    length, layers = 2**20, 32
    config = dataclasses.replace(shapes.SHAPES["llama3-8b"](), max_position=length)
    zeros = lambda shape: np.broadcast_to(np.zeros((), shape.dtype), shape.shape)
    subject = Subject(
        name="8b", config=config, tokens=lambda length: jnp.zeros((1, length)), text="",
        params=jax.tree.map(zeros, abstract_params(config, jnp.bfloat16)), distinct=None,
        model=None,
    )  # fmt: skip
    adaptive = mj.AdaptiveAttention(mj.BlockThreshold(0.1)).for_layers(layers)
    counts = np.broadcast_to(np.int32(1), (layers, 32, length // 128))
    attention = dataclasses.replace(adaptive, estimator=Prescribed(adaptive.estimator, counts))
    cache = whole.choose_cache(("all", "int8"), subject, attention, length, None)
    assert cache.label == "int8"
    case = whole.Case(
        name="a", subject=subject, length=length, attention=attention, cache=cache, chunk_size=None
    )
    programs = Programs()
    whole.add(programs, case)
    [(function, arguments)] = programs._wanted.values()
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # Block scores and attention: what is not visited is estimated all the same.
    assert text.count("@mosaic_gpu_v2") == 2
    assert f"{length}x{config.vocab_size}" not in text


def test_cudnn_refuses_chunks():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="whole prompts only"):
        CudnnAttention()(q, q, q, q_offset=jnp.int32(4))


def test_render_draws_a_record_without_measuring(tmp_path, capsys):
    record = tmp_path / "ttft.jsonl"
    append = lambda point, **row: append_record(
        record, kind=KIND, argv=["test"], config=point, result={**ROW, **row}
    )
    append(dataclasses.replace(POINT, timed_layers=2))
    append(dataclasses.replace(POINT, method="cudnn"), seconds=4.0)
    sparse = dataclasses.replace(POINT, method="minference")
    append(sparse, seconds=1.0, executed_share=0.05)
    rows = read_rows(record)
    assert speed_up(rows, sparse) == 4.0  # cuDNN's comes before our own
    assert speed_up(rows, dataclasses.replace(POINT, method="cudnn")) is None
    arguments = ["ttft", "--render", "--record", str(record), "--plot", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| 1K | minference | 1 | 4x |" in out
    assert "| 1K | dense | 8* |" in out
    assert markdown(rows) in (tmp_path / "ttft.md").read_text()
    assert (tmp_path / "ttft.png").stat().st_size > 5000
    assert not (tmp_path / "ttft-parts.png").exists()  # no row was split
    assert len(json.loads(record.read_text().splitlines()[0])) == 5


def test_cut_line_is_removed_and_rows_of_other_revisions_are_measured_again(tmp_path):
    record = tmp_path / "ttft.jsonl"
    append_record(record, kind=KIND, argv=["test"], config=POINT, result=ROW)
    rows = read_rows(record)
    assert list(rows.figures) == [POINT]
    assert read_rows(record, like=rows.environment | {"git": "another"}).figures == {}
    with record.open("a") as file:
        file.write('{"schema": 1, "ki')
    assert main(["ttft", "--render", "--record", str(record)]) == 0
    assert record.read_text().endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "100000"], "--rope-scaling"),
        (["--lengths", "0"], "at least 1"),
        (["--shape", "llama3-8b"], "expected one of --model and --shape, got both"),
        (["--methods", "cudnn"], "needs a CUDA device"),
        (["--methods", "dense+snapkv:64"], "--kv-cache says what is kept"),
        (["--methods", "inf_llm:1024", "--chunk-size", "64"], "reads whole prompts"),
        (["--methods", "static:qwen2.5-coder-1.5b"], "needs lines of another prompt"),
        (["--kv-cache", "half"], "--kv-cache must be"),
        (["--kv-cache", "int8", "--chunk-size", "64"], "needs the whole prompt at once"),
        (["--texts", "nowhere.txt"], "there is no text nowhere.txt"),
        (["--render"], "name its file with --record"),
    ],
)
def test_bad_options_are_explained(arguments, message, tiny_model, capsys):
    assert main(["ttft", "--model", tiny_model, "--lengths", "100", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_random_weights_need_densities_for_adaptive_methods(tiny_shape, tmp_path, capsys):
    arguments = ["ttft", "--shape", "smollm2-135m", "--lengths", "100", "--methods", "minference"]
    assert main(arguments) == 2
    assert "scores" in capsys.readouterr().err
    assert main([*arguments, "--densities", str(tmp_path)]) == 2
    assert "has nothing about hybrid:0.1,512 at 100 tokens" in capsys.readouterr().err


def test_what_cannot_fit_is_told_before_anything_runs(tiny_shape, monkeypatch, capsys):
    monkeypatch.setattr(whole, "device_memory", lambda: 10_000)
    arguments = ["ttft", "--shape", "smollm2-135m", "--lengths", "100", "--methods", "dense"]
    assert main([*arguments, "--kv-cache", "all", "int8"]) == 2
    error = capsys.readouterr().err
    assert "the prefill needs about" in error
    assert "--kv-cache" in error
