"""`minference infinitebench`: samples that are read and made, their metrics, what is refused."""

import functools
import json

import jax.numpy as jnp
import pytest

from experiments.__main__ import main
from experiments.common.errors import UserError
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines, replace_lines
from experiments.evaluation.stages import Score
from experiments.infinitebench.command import drafts, task_table
from experiments.infinitebench.read import check_file
from models import load_model

LENGTH = 220


@pytest.fixture
def argv(tiny_model, tmp_path):
    found = ["infinitebench", "--model", tiny_model, "--rope-scaling", "linear:8"]
    found += ["--methods", "dense", "--output", str(tmp_path / "run"), "--samples", "2"]
    return [*found, "--length", str(LENGTH)]


@pytest.fixture
def data(tmp_path):
    """A released file of questions about a book; its long text is much longer than the context."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [
        {"context": " ".join(f"t{n}" for _ in range(900)), "input": f"Who is {n}?", "answer": [a]}
        for n, a in ((5, "Ann Lee"), (6, "Bob"), (7, "Cy"))
    ]
    (folder / "longbook_qa_eng.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_samples_are_read_or_made_and_scored_by_their_task(argv, data, tmp_path, capsys):
    folder = tmp_path / "run"
    argv += ["--tasks", "longbook_qa_eng", "passkey", "--data", str(data)]
    assert main([*argv, "--limit", "1"]) == 0
    assert len(read_lines(folder / "dense" / "predictions.jsonl")) == 2
    assert main(argv) == 0
    samples = {line["name"]: line for line in read_lines(folder / "samples.jsonl")}
    assert sorted(samples) == [
        *(f"longbook_qa_eng-{LENGTH}-{place}" for place in range(3)),
        *(f"passkey-{LENGTH}-{place}" for place in range(2)),
    ]
    predictions = read_lines(folder / "dense" / "predictions.jsonl")
    for line in predictions:
        sample = samples[line["name"]]
        fitted = LENGTH - sample["max_new_tokens"]
        assert fitted - 6 <= line["prompt_tokens"] <= fitted
    book = samples[f"longbook_qa_eng-{LENGTH}-2"]
    assert book["prompt"].endswith("Question: Who is 7?")
    assert 100 < book["prompt"].count("t7") < 200
    replace_lines(
        folder / "dense" / "predictions.jsonl",
        [line | {"answer": f"{samples[line['name']]['answers'][0]} Lee"} for line in predictions],
    )
    capsys.readouterr()
    assert main(argv) == 0
    [record] = read_records(folder / "record.jsonl", kind="infinitebench")
    found = {mean["task"]: mean["score"] for mean in record["result"]["means"]}
    f1 = (4 / 5 + 2 / 3 + 2 / 3) / 3
    assert found == pytest.approx({"longbook_qa_eng": f1, "passkey": 1})
    assert f"{100 * (1 + f1) / 2:.1f}" in capsys.readouterr().out
    # Another file under the same name is another run.
    (data / "longbook_qa_eng.jsonl").write_text(json.dumps(
        {"context": "t3", "input": "Who?", "answer": ["Ann"]}) + "\n")  # fmt: skip
    assert main(argv) == 2
    assert "made with longbook_qa_eng_sha256" in capsys.readouterr().err


def test_the_table_has_a_column_for_each_method():
    of = lambda task, score: Score(
        name="",
        task=task,
        length=8,
        score=score,
        density=score / 2,
        prefill_seconds=1.0,
        decode_seconds=0.5,
        cache_bytes=2 << 20,
    )
    scores = {
        "dense": [of("passkey", 1.0), of("math_find", 1.0), of("math_find", 0.0)],
        "other": [of("passkey", 0.5), of("math_find", 0.0), of("math_find", 0.0)],
    }
    table = task_table(scores, title="")
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("passkey", "8", "1", "100.0", "50.0"),
        ("math_find", "8", "2", "50.0", "0.0"),
        ("average", "", "", "75.0", "25.0"),
        ("pairs visited, %", "8", "3", "33.3", "8.3"),
        ("prefill, s", "8", "3", "1", "1"),
        ("decoding, s", "8", "3", "0.5", "0.5"),
        ("cache, MiB", "8", "3", "2", "2"),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--tasks", "novel"], "novel", id="unknown"),
        pytest.param(["--tasks", "passkey", "passkey"], "--tasks names passkey twice", id="twice"),
        pytest.param(
            ["--tasks", "code_run"], "code_run cannot be made: name the folder that holds code_run",
            id="no-data",
        ),
        pytest.param(
            ["--tasks", "passkey", "code_run", "--data", "."], "code_run needs code_run.jsonl",
            id="no-file",
        ),
        pytest.param(["--data", "nowhere"], "there is no folder nowhere", id="no-folder"),
        pytest.param(["--tasks", "code_debug", "--data", "bad"], "line 1: not JSON", id="no-json"),
        pytest.param(["--length", "80"], "kv_retrieval take up to 80 tokens", id="length"),
        pytest.param(["--samples", "0"], "at least 1, got 0", id="samples"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, options, words
):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "code_debug.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)
    assert main(["infinitebench", "--model", "missing", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_package_is_told_before_a_model_is_loaded(capsys, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (data / "longbook_sum_eng.jsonl").write_text("{}\n")
    argv = ["infinitebench", "--model", "missing", "--data", str(data)]
    assert main([*argv, "--tasks", "longbook_sum_eng"]) == 2
    assert "minference-jax[evaluation]" in capsys.readouterr().err


def test_the_length_is_the_context_if_none_is_given(tiny_model, data):
    model = load_model(tiny_model, dtype=jnp.float32)
    made = functools.partial(drafts, model, length=None, samples=1, seed=0, chat=True)
    file = check_file(data / "longbook_qa_eng.jsonl", "longbook_qa_eng")
    found = made(files={"longbook_qa_eng": file})
    sample = found[1].make()
    context = model.config.max_position
    assert sample.length == found[1].length == context
    read = len(model.tokenizer.encode(sample.prompt + sample.lead))
    assert context - 6 <= read + sample.max_new_tokens <= context
    with pytest.raises(UserError, match=f"take up to 30000 .* the model's context of {context}"):
        made(files={"math_calc": file})
