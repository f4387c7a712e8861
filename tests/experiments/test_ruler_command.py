"""`minference ruler`: what is prepared, scored and drawn, what is skipped and refused."""

import json

import jax.numpy as jnp
import pytest
from matplotlib.image import imread

from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines, replace_lines
from experiments.evaluation.stages import Score
from experiments.ruler.command import drafts
from experiments.ruler.report import averages, grid_table, in_words
from models import load_model
from tests.experiments.test_needle import BOOK

LENGTH = 300


@pytest.fixture
def argv(tiny_model, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    found = ["ruler", "--model", tiny_model, "--rope-scaling", "linear:8", "--text", str(book)]
    found += ["--methods", "dense", "--output", str(tmp_path / "run"), "--samples", "2"]
    return [*found, "--lengths", str(LENGTH), "--tasks", "niah_single_1", "niah_multivalue"]


def test_tasks_are_prepared_scored_and_drawn(argv, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(argv) == 0
    samples, predictions = (
        read_lines(folder / f"{name}.jsonl") for name in ("samples", "dense/predictions")
    )
    tasks = ("niah_single_1", "niah_multivalue")
    assert [sample["name"] for sample in samples] == [
        f"{task}-{LENGTH}-{index}" for task in tasks for index in (0, 1)
    ]
    for prediction in predictions:
        assert LENGTH - 10 <= prediction["prompt_tokens"] + 128 <= LENGTH
    # Whatever is missing is made again, and it is the same.
    whole = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(whole[: int(0.6 * len(whole))])
    # Answers of another run: every value of the first task, one of four of the second.
    known = {sample["name"]: sample for sample in samples}
    replace_lines(
        folder / "dense" / "predictions.jsonl",
        [line | {"answer": f"It is {known[line['name']]['answers'][0]}."} for line in predictions],
    )
    capsys.readouterr()
    assert main(argv) == 0
    assert (folder / "samples.jsonl").read_bytes() == whole
    [record] = read_records(folder / "record.jsonl", kind="ruler")
    assert [mean["score"] for mean in record["result"]["means"]] == [1, 0.25]
    shown = capsys.readouterr().out
    assert "62.5" in shown
    assert "effective length: none" in shown
    assert imread(folder / "ruler.png").std() > 0.05
    assert main([*argv, "--seed", "1"]) == 2
    assert "made with seed = 0, this one has 1" in capsys.readouterr().err


def of(task, length, score):
    return Score(
        name="",
        task=task,
        length=length,
        score=score,
        density=score / 2,
        prefill_seconds=1.0,
        decode_seconds=0.5,
        cache_bytes=2 << 20,
    )


def test_averages_are_over_tasks_whatever_their_samples():
    scores = [of("vt", 8, 1.0), of("cwe", 8, 0.8), of("cwe", 8, 1.0), of("cwe", 4, 0.9)]
    scores += [of("vt", 4, 1.0), of("vt", 16, 0.0), of("cwe", 16, 1.0)]
    assert averages(scores) == pytest.approx({4: 0.95, 8: 0.95, 16: 0.5})
    assert in_words(scores).startswith("effective length: 8 tokens, up to which the average")
    table = grid_table(scores, title="")
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("vt", "100.0", "100.0", "0.0"),
        ("cwe", "90.0", "90.0", "100.0"),
        ("average", "95.0", "95.0", "50.0"),
        ("pairs visited, %", "47.5", "46.7", "25.0"),
        ("prefill, s", "1", "1", "1"),
        ("decoding, s", "0.5", "0.5", "0.5"),
        ("cache, MiB", "2", "2", "2"),
    ]


def test_questions_without_files_are_skipped_with_a_notice(argv, capsys, tmp_path):
    tasks = ["--tasks", "qa_1", "qa_2"]
    assert main([*argv, *tasks]) == 2
    told = capsys.readouterr()
    assert "skipped: qa_1, there is no squad.json in --questions FOLDER" in told.out
    assert "every task asked for lacks its file" in told.err
    qas = [{"question": "Who?", "answers": [{"text": "t3"}], "is_impossible": False}]
    data = {"data": [{"paragraphs": [{"context": "t3 t4", "qas": qas}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(data))
    assert main([*argv, *tasks, "--questions", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out.strip() == f"skipped: qa_2, there is no hotpotqa.json in {tmp_path}"
    assert "qa_1 has 1 questions, but --samples is 2" in told.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--tasks", "novel"], "novel", id="unknown"),
        pytest.param(["--tasks", "vt", "vt"], "--tasks names vt twice", id="twice"),
        pytest.param(["--lengths", "900", "900"], "--lengths names 900 twice", id="lengths"),
        pytest.param(["--lengths", "200"], "at least 256, got 200", id="short"),
        pytest.param(["--samples", "0"], "at least 1, got 0", id="samples"),
        pytest.param(["--text", "none.txt"], "none.txt", id="text"),
        pytest.param(["--questions", "q"], "belongs to --tasks qa_1 qa_2", id="questions"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    assert main(["ruler", "--model", "missing", *options]) == 2
    assert words in capsys.readouterr().err


def test_context_and_text_must_be_long_enough(argv, capsys):
    assert main([*argv, "--lengths", "100000"]) == 2
    assert "100000 tokens do not fit the model's context" in capsys.readouterr().err
    assert main([*argv, "--lengths", "300", "--tasks", "cwe"]) == 2
    assert "cwe of 300 tokens cannot be made: the shortest" in capsys.readouterr().err


def test_a_prompt_may_take_the_whole_context(tiny_model):
    """Sizes that are tried on the way are longer than the context, and no error."""
    model = load_model(tiny_model, dtype=jnp.float32)
    length = model.config.max_position
    text = " ".join(f"t{n}" for n in range(400))
    [draft] = drafts(
        model, questions={"niah_single_2": None}, lengths=[2 * length], samples=1, text=text,
        seed=0, chat=True,
    )  # fmt: skip
    sample = draft.make()
    read = len(model.tokenizer.encode(sample.prompt + sample.lead))
    assert read + sample.max_new_tokens == 2 * length
