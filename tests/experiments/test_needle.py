"""`minference needle`: where the needle lies, what is scored and drawn, what is refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.__main__ import main
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines, replace_lines
from experiments.needle.samples import drafts, needle_prompt, place_of
from models import load_model
from models.common.tokenizer import Tokenizer

LENGTH = 300
BOOK = "\n\n".join(
    " ".join(f"t{3 + (7 * line + word) % 50}{'.' if word % 8 == 7 else ''}" for word in range(24))
    for line in range(40)
)
NEEDLE = re.compile(r"\nThe special magic (\w+) number is: (\d{7})\n")


@pytest.mark.parametrize("depth", [0.0, 11.0, 50.0, 89.0, 100.0])
def test_the_needle_ends_a_sentence_before_its_depth(depth):
    prompt = needle_prompt(BOOK, 300, depth=depth, draw="a")
    [(city, number)] = NEEDLE.findall(prompt.text)
    before, after = NEEDLE.sub("|", prompt.text.split("\n\nGive a")[0]).split("|")
    share = len(before) / len(before + after)
    assert depth / 100 - 0.1 < share <= depth / 100
    assert before == "" or before.endswith(".") or depth == 100
    assert len((before + after).split()) == 300
    assert prompt.answer == number
    assert prompt.text.endswith(f"What is the special magic {city} number?\nAnswer:")


def test_the_place_is_the_last_end_of_a_sentence():
    depths = {0.0: 0, 20.0: 0, 30.0: 3, 60.0: 3, 70.0: 7, 90.0: 7, 100.0: 10}
    assert {depth: place_of("ab. cd. ef", depth) for depth in depths} == depths


def test_a_draw_decides_passage_city_and_number():
    drawn = [needle_prompt(BOOK, 50, depth=50.0, draw=draw) for draw in ("a", "a", "b")]
    assert drawn[0] == drawn[1]
    assert drawn[0].answer != drawn[2].answer
    assert drawn[0].text[:40] != drawn[2].text[:40]


@pytest.mark.parametrize("lead", [False, True])
def test_a_lead_is_read_with_the_prompt_and_counts(tiny_model, lead):
    model = load_model(
        tiny_model, dtype=jnp.float32, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    [draft] = drafts(
        model, book=BOOK, lengths=[200], depths=[50.0], rounds=1, seed=0, chat=True, lead=lead
    )
    sample = draft.make()
    [(city, _)] = NEEDLE.findall(sample.prompt)
    assert sample.lead == (f" The special magic {city} number is: " if lead else "")
    assert len(model.tokenizer.encode(sample.prompt + sample.lead)) == 200 - 32


def test_a_prompt_can_fill_the_context(tiny_model, monkeypatch):
    # A token for each character, and words so uneven that prompts are tried beyond the context.
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **_: [3] * len(text))
    model = load_model(
        tiny_model, dtype=jnp.float32, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    context = model.config.max_position
    book = " ".join(["a"] * 100 + ["a" * 20] * 100)
    [draft] = drafts(
        model, book=book, lengths=[context], depths=[50.0], rounds=1, seed=0, chat=True, lead=False
    )
    assert context - 32 - 21 < len(draft.make().prompt) <= context - 32


def test_grid_is_read_scored_and_drawn(tiny_model, tmp_path, capsys):
    folder, book = tmp_path / "run", tmp_path / "book.txt"
    book.write_text(BOOK)
    argv = ["needle", "--model", tiny_model, "--rope-scaling", "linear:8", "--text", str(book)]
    grid = ["--lengths", str(LENGTH), "--depths", "3", "--output", str(folder)]
    grid += ["--methods", "dense", "dense+streaming:4,60", "--batch-size", "3"]
    assert main([*argv, *grid]) == 0
    samples, predictions = (
        read_lines(folder / f"{name}.jsonl") for name in ("samples", "dense/predictions")
    )
    assert [sample["name"] for sample in samples] == [
        f"{LENGTH} tokens, {depth} %, 0" for depth in (0, 50, 100)
    ]
    for prediction in predictions:
        assert LENGTH - 40 < prediction["prompt_tokens"] <= LENGTH - 32
        assert prediction["density"] == 1
    # Answers of another run, one of them right: what is there is scored as it is.
    right = samples[1]["answers"][0]
    replace_lines(
        folder / "dense" / "predictions.jsonl",
        [line | {"answer": f"It is {right}."} for line in predictions],
    )
    assert main([*argv, *grid]) == 0
    assert [line["score"] for line in read_lines(folder / "dense" / "scores.jsonl")] == [0, 1, 0]
    record, kept = read_records(folder / "record.jsonl", kind="needle")
    [mean] = record["result"]["means"]
    assert kept["result"]["method"] == "dense+streaming:4,60"
    assert (mean["samples"], mean["score"]) == (3, pytest.approx(1 / 3))
    assert record["config"]["depths"] == 3
    assert "33.3" in capsys.readouterr().out
    assert_drawn(imread(folder / "needle-dense.png")[..., :3], [False, True, False])
    assert (folder / "needle-dense+streaming-4,60.png").exists()
    assert main([*argv, *grid, "--seed", "1"]) == 2
    assert "made with seed = 0, this one has 1" in capsys.readouterr().err


def assert_drawn(pixels, found):
    """Rows of one column of cells are green where found and red where not."""
    _, width, _ = pixels.shape
    column = pixels[:, round(0.45 * width)]
    green = column[:, 1] - column[:, 0] > 0.3
    red = column[:, 0] - column[:, 1] > 0.3
    marks = [name for name, here in (("red", red), ("green", green)) if here.any()]
    assert marks == ["red", "green"]
    cells = np.where(green, 1, np.where(red, 0, -1))
    cells = cells[cells >= 0]
    order = cells[np.flatnonzero(np.diff(cells, prepend=-1))]
    assert order.tolist() == [int(one) for one in found]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(["--text", "none.txt"], "none.txt", id="no-text"),
        pytest.param(["--lengths", "40"], "at least 64, got 40", id="length"),
        pytest.param(["--lengths", "100", "100"], "--lengths names 100 twice", id="twice"),
        pytest.param(["--lengths"], "--lengths must name at least one", id="none"),
        pytest.param(["--depths", "0"], "at least 1, got 0", id="depths"),
        pytest.param(["--limit", "0"], "at least 1, got 0", id="limit"),
        pytest.param(
            ["--methods", "inf_llm:256", "--chunk-size", "8"],
            "inf_llm:256 needs the whole prompt at once; leave out --chunk-size",
            id="chunks",
        ),
        pytest.param(
            ["--methods", "patterns:none.json"], "no pattern file at none.json", id="patterns"
        ),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    assert main(["needle", "--model", "missing", *argv]) == 2
    assert words in capsys.readouterr().err


def test_context_and_text_must_be_long_enough(tiny_model, capsys, tmp_path):
    argv = ["needle", "--model", tiny_model, "--output", str(tmp_path)]
    assert main([*argv, "--lengths", "100000"]) == 2
    assert "100000 tokens do not fit the model's context" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("t3 t4.")
    argv += ["--rope-scaling", "linear:8"]
    assert main([*argv, "--text", str(short), "--lengths", "500"]) == 2
    assert "name a longer one with --text" in capsys.readouterr().err
