"""Prompts of a wanted length hold what they ask for, and depend on the seed alone."""

import bisect
import json
import re

import pytest

from experiments.common.errors import UserError
from experiments.common.prompts import (
    book_prompt,
    fit_prompt,
    key_value_prompt,
    needle_prompt,
    packaged_chapter,
    read_book,
)

BOOK = packaged_chapter()
BUILDERS = [
    lambda size, seed: key_value_prompt(size, seed=seed),
    lambda size, seed: needle_prompt(BOOK, size, seed=seed),
    lambda size, seed: book_prompt(BOOK, size, seed=seed),
]
NAMES = ["key-value", "needle", "book"]


def count(text):
    return len(text.split())


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_the_seed_decides(build):
    assert build(50, 1) == build(50, 1)
    assert build(50, 1).text != build(50, 2).text


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
@pytest.mark.parametrize("length", [40, 1000, 3000])
def test_the_largest_prompt_that_fits_is_found(build, length):
    fitted = fit_prompt(lambda size: build(size, 0), count, length)
    size = bisect.bisect_right(
        range(length + 2), length, lo=1, key=lambda size: count(build(size, 0).text)
    )
    assert fitted == build(size - 1, 0)
    assert count(fitted.text) <= length < count(build(size, 0).text)


def test_pairs_are_json_and_the_answer_is_the_value_of_the_key():
    prompt = key_value_prompt(20, seed=3)
    pairs = json.loads(re.search(r"\{.*\}", prompt.text, re.DOTALL).group())
    [key] = [key for key in pairs if prompt.text.count(key) == 2]
    assert len(pairs) == 20
    assert pairs[key] == prompt.answer


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_at_its_depth_and_the_question_at_the_end(depth):
    prompt = needle_prompt(BOOK, 2000, seed=5, depth=depth)
    assert prompt.text.count(prompt.answer) == 1
    assert abs(prompt.text.index(prompt.answer) / len(prompt.text) - depth) < 0.1
    assert prompt.text.endswith("magic number?")


def test_a_passage_goes_on_with_the_beginning_and_never_repeats():
    words = count(BOOK)
    assert sorted(book_prompt(BOOK, words, seed=1).text.split()) == sorted(BOOK.split())
    assert book_prompt(BOOK, 2 * words, seed=1) == book_prompt(BOOK, words, seed=1)


def test_texts_that_are_too_short_or_prompts_too_long_are_told():
    with pytest.raises(UserError, match=r"has only \d+ tokens, 99999 were asked for"):
        fit_prompt(lambda size: book_prompt(BOOK, size, seed=0), count, 99999)
    with pytest.raises(UserError, match="shortest such prompt has"):
        fit_prompt(lambda size: key_value_prompt(size, seed=0), count, 3)


def test_books_are_files_or_folders(tmp_path):
    for name, text in (("b.txt", "two"), ("a.txt", "one\n"), ("c.md", "no")):
        (tmp_path / name).write_text(text)
    assert read_book(tmp_path) == "one\n\ntwo"
    assert read_book(tmp_path / "b.txt") == "two"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty").mkdir()
    for path, words in (
        ("bad.txt", "not UTF-8"), ("empty", "no .txt file"), ("none.txt", "No such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_book(tmp_path / path)
