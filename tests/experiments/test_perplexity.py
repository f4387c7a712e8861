"""`minference perplexity`: figures against numpy, texts, what a kill leaves, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.__main__ import main
from experiments.common.methods import parse_method
from experiments.common.programs import Programs
from experiments.common.record import read_records
from experiments.evaluation.folder import append_lines, read_lines
from experiments.perplexity import command, measure
from experiments.perplexity.measure import Text, means, measure_all
from experiments.perplexity.read import Reader, read
from experiments.perplexity.texts import encode_texts, files_of
from minference_jax import DenseAttention, SparseAttention
from models import load_model
from models.common.decoder import forward

LENGTH = 300
SPARSE = "a_shape:2,8"


@pytest.fixture(scope="module")
def model(tiny_model):
    scaling = {"rope_type": "linear", "factor": 8.0}
    return load_model(tiny_model, dtype=jnp.float32, rope_scaling=scaling)


def words(number, seed=0):
    return " ".join(f"t{i}" for i in np.random.default_rng(seed).integers(3, 60, number))


def reader(spec):
    method = parse_method(spec)
    return Reader(method.attention(2, 4), method.compression(2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """Plain attention inside a mask for each layer."""

    mask: Any

    def __call__(self, q, k, v, *, lengths, q_offset):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(self.mask[None, None], scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def visited_mask():
    """What an attention that does not depend on the data visits."""
    attention = parse_method(SPARSE).attention(2, 4).layer(0)

    @jax.jit
    def mask(x):
        return attention.attend(x, x, x)[1].to_mask(LENGTH, LENGTH)[0, 0]

    return np.asarray(mask(jnp.zeros((1, LENGTH, 4, 16))))


def log_softmax(model, mask, tokens):
    logits = forward(
        model.params, jnp.asarray(tokens)[None], config=model.config,
        attention_fn=Masked(jnp.stack([jnp.asarray(mask)] * 2)),
    )  # fmt: skip
    logits = np.asarray(logits[0], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_command_measures_what_whole_distributions_say(tiny_model, model, tmp_path, capsys):
    texts, folder = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    for name, number in (("long", 2 * LENGTH), ("short", LENGTH - 1)):
        (texts / f"{name}.txt").write_text(words(number))
    argv = ["perplexity", "--model", tiny_model, "--rope-scaling", "linear:8"]
    argv += ["--texts", str(texts), "--lengths", str(LENGTH), "--output", str(folder)]
    argv += ["--methods", "dense", SPARSE]
    assert main(argv) == 0
    told = capsys.readouterr()
    assert "left out: short.txt has 299 tokens" in told.err
    tokens = model.tokenizer.encode(words(2 * LENGTH))[:LENGTH]
    causal, mask = np.tri(LENGTH, dtype=bool), visited_mask()
    dense, other = (log_softmax(model, each, tokens)[:-1] for each in (causal, mask))
    [row] = read_lines(folder / "a_shape-2,8" / "rows.jsonl")
    nll, dense_nll = (-x[np.arange(LENGTH - 1), tokens[1:]].mean() for x in (other, dense))
    kl = np.sum(np.exp(dense) * (dense - other), axis=1).mean()
    assert abs(nll - dense_nll) > 1e-4
    np.testing.assert_allclose([row["nll"], row["dense_nll"]], [nll, dense_nll], rtol=1e-5)
    np.testing.assert_allclose(row["kl"], kl, rtol=1e-3)
    assert row["top1"] == pytest.approx((dense.argmax(1) == other.argmax(1)).mean())
    assert row["density"] == pytest.approx(mask.sum() / causal.sum(), abs=1e-5)
    assert row["density"] < 0.9
    [of_dense] = read_lines(folder / "dense" / "rows.jsonl")
    assert (of_dense["nll"], of_dense["kl"], of_dense["density"]) == (row["dense_nll"], 0, 1)
    of_dense, record = read_records(folder / "record.jsonl", kind="perplexity")
    assert [each["result"]["method"] for each in (of_dense, record)] == ["dense", SPARSE]
    assert record["result"]["rows"] == [row]
    [mean] = record["result"]["means"]
    assert mean["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
    assert f"{np.exp(nll):.3f}" in told.out
    assert imread(folder / "perplexity.png").shape[2] == 4
    # A run that went to its end measures nothing again.
    files = sorted(folder.glob("*/rows.jsonl"))
    before = [path.read_bytes() for path in files]
    assert main(argv) == 0
    assert [path.read_bytes() for path in files] == before
    assert len(files) == 2


class Noting(Programs):
    """Programs that note with what attention prompts are read."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, lower, *arguments, **static):
        if lower == read.lower:
            self.seen.append(arguments[2].attention)
        return super().run(lower, *arguments, **static)


def test_another_kernels_dense_attention_is_read_for_itself(model):
    made = {spec: reader(spec) for spec in ("dense", "dense:reference")}
    tokens = np.array(model.tokenizer.encode(words(40)))
    found = dict(measure.measure(model, made, tokens, programs := Noting()))
    assert programs.seen == [DenseAttention(), DenseAttention(implementation="reference")]
    assert found["dense"]["kl"] == 0
    assert found["dense:reference"]["nll"] == pytest.approx(found["dense"]["nll"], rel=1e-5)


@pytest.mark.parametrize("killed_after", range(9))
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_killed_run_ends_with_the_files_of_an_unbroken_one(
    model, tmp_path, monkeypatch, killed_after, cut
):
    written, methods = [], {"one": lambda _: 1, "two": lambda _: 2}

    def fake(model, readers, tokens, programs, continuation):
        names = ("dense_nll", "nll", "kl", "top1", "density")
        for label, number in readers.items():
            figures = [len(tokens) / 7 + int(tokens[0]) + at + number for at in range(5)]
            yield label, dict(zip(names, figures, strict=True))

    def dying(path, values, at):
        append_lines(path, values)
        written.append(path)
        if len(written) == at:
            path.write_bytes(path.read_bytes()[: -cut or None])
            raise KeyboardInterrupt

    def run(name, at=0):
        written.clear()
        (tmp_path / name).mkdir(exist_ok=True)
        paths = {label: tmp_path / name / label for label in methods}
        with monkeypatch.context() as patch:
            patch.setattr(measure, "measure", fake)
            patch.setattr(measure, "_compile", lambda *_: None)
            patch.setattr(measure, "append_lines", lambda *x: dying(*x, at))
            return measure_all(paths, texts, [4, 9], model, methods)

    texts = [Text(name, np.arange(at, at + 9, dtype=np.int32)) for at, name in enumerate("ab")]
    rows = run("whole")
    points = [("a", 4), ("b", 4), ("a", 9), ("b", 9)]
    assert all([(row.text, row.length) for row in each] == points for each in rows.values())
    if killed_after:
        with pytest.raises(KeyboardInterrupt):
            run("killed", killed_after)
    assert run("killed") == rows
    for label in methods:
        whole, killed = ((tmp_path / name / label).read_bytes() for name in ("whole", "killed"))
        assert whole == killed
    assert len(written) == 8 - killed_after + min(killed_after, 1 if cut else 0)


def test_dense_attention_reads_a_text_once_with_what_was_compiled_first(model):
    readers = {spec: reader(spec) for spec in ("dense", SPARSE)}
    programs = Noting()
    measure._compile(programs, model, readers, LENGTH, None)
    assert len(programs) == 3
    found = dict(measure.measure(model, readers, np.arange(3, 3 + LENGTH) % 60, programs))
    assert list(found) == ["dense", SPARSE]
    assert [type(one) for one in programs.seen] == [DenseAttention, SparseAttention]
    assert len(programs) == 3
    measure._compile(programs, model, {}, LENGTH + 1, None)
    assert list(measure.measure(model, {}, np.arange(3), programs)) == []
    assert len(programs) == 3


def test_perplexity_is_over_all_predictions():
    row = measure.Row(
        text="a", sha256="", length=4, dense_nll=1.0, nll=2.0, kl=0.1, top1=1.0, density=0.5
    )
    [mean] = means([row, dataclasses.replace(row, nll=4.0, kl=0.3)])
    assert (mean.length, mean.texts, mean.kl) == (4, 2, pytest.approx(0.2))
    assert mean.perplexity == pytest.approx(np.exp(3.0))
    assert mean.dense_perplexity == pytest.approx(np.exp(1.0))


def test_texts_are_drawn_among_those_that_are_long_enough(model, tmp_path):
    for at in range(6):
        (tmp_path / f"{at}.txt").write_text(words(20 + at, at))
    files = files_of([tmp_path])
    draw = lambda seed: [
        text.name
        for text in encode_texts(
            model, files, length=22, limit=2, seed=seed, console=Console(quiet=True)
        )
    ]
    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(8)}) > 3
    assert {name for seed in range(8) for name in draw(seed)} == {f"{at}.txt" for at in range(2, 6)}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        pytest.param(["--texts", "none.txt"], "there is no text none.txt", id="no-text"),
        pytest.param(["--texts", "."], "there is no .txt file in", id="empty-folder"),
        pytest.param(["--lengths", "1"], "at least 2, got 1", id="length"),
        pytest.param(["--lengths"], "at least one length", id="no-length"),
        pytest.param(["--limit", "0"], "at least 1, got 0", id="limit"),
        pytest.param(
            ["--methods", "dense+snapkv:64"], "leave out +snapkv:64 of dense", id="compression"
        ),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, told
):
    monkeypatch.chdir(tmp_path)
    assert main(["perplexity", "--model", "missing", *argv]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "argv", "told"),
    [
        pytest.param(words(20).encode(), [], "no text has the 50 tokens", id="short"),
        pytest.param(b"", [], "holds no text", id="empty"),
        pytest.param(b"\xff\xfe", [], "is not UTF-8 text", id="encoding"),
        pytest.param(
            words(60).encode(), ["--lengths", "100000"], "model's context of", id="context"
        ),
        pytest.param(
            words(60).encode(), ["--methods", "patterns:qwen2.5-coder-1.5b"], "12", id="size"
        ),
    ],
)
def test_unfit_inputs_are_told_before_weights_are_read_or_files_written(
    tiny_model, tmp_path, capsys, monkeypatch, text, argv, told
):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("read the weights"))
    path, folder = tmp_path / "text.txt", tmp_path / "run"
    path.write_bytes(text)
    options = ["--texts", str(path), "--output", str(folder), "--lengths", "50", *argv]
    assert main(["perplexity", "--model", tiny_model, *options]) == 2
    assert told in capsys.readouterr().err
    assert not folder.exists()
