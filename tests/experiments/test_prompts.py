"""Prompts of a wanted length hold what they ask for, and depend on the seed alone."""

import bisect
import itertools
import json
import os
import re
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.common.prompts import (
    book_of,
    book_prompt,
    build_prompt,
    code_prompt,
    fit_prompt,
    key_value_prompt,
    multi_needle_prompt,
    needle_prompt,
    packaged_chapter,
    read_book,
)

BOOK = packaged_chapter()
NAMES = ["key_value", "needle", "multi_needle", "book", "code"]
BUILDERS = [
    lambda size, seed, task=task: build_prompt(task, size, seed=seed, book=BOOK) for task in NAMES
]


def count(text):
    return len(text.split())


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_the_seed_decides(build):
    assert build(50, 1) == build(50, 1)
    assert build(50, 1).text != build(50, 2).text


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
@pytest.mark.parametrize("length", [80, 1000, 3000])
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


def test_needles_of_successive_seeds_spread_over_the_passage():
    prompts = [needle_prompt(BOOK, 3000, seed=seed) for seed in range(8)]
    depths = sorted(prompt.text.index(prompt.answer) / len(prompt.text) for prompt in prompts)
    assert 0.05 < depths[0] < 0.25
    assert 0.75 < depths[-1] < 0.95
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.25


@pytest.mark.parametrize("seed", range(6))
def test_one_of_several_needles_is_asked_for(seed):
    prompt = multi_needle_prompt(BOOK, 3000, seed=seed)
    facts = re.findall(r"The (\w+) keeper's magic number is (\d{7})\.", prompt.text)
    assert len({place for place, _ in facts}) == len({number for _, number in facts}) == 4
    [asked] = re.findall(r"What is the (\w+) keeper's magic number\?$", prompt.text)
    assert dict(facts)[asked] == prompt.answer
    assert prompt.text.count(prompt.lead + prompt.answer) == 1
    paragraphs = prompt.text.split("\n\n")[1:-1]
    for part, (_, number) in enumerate(facts):  # one in each part of 0.1 to 0.9
        [at] = [at for at, text in enumerate(paragraphs) if number in text]
        assert abs(at / len(paragraphs) - (0.2 + 0.2 * part)) < 0.1 + 1.5 / len(paragraphs)


def test_the_needle_asked_for_lies_anywhere():
    prompts = [multi_needle_prompt(BOOK, 3000, seed=seed) for seed in range(12)]
    depths = [prompt.text.index(prompt.answer) / len(prompt.text) for prompt in prompts]
    assert min(depths) < 0.35 < 0.65 < max(depths)


def test_code_is_source_of_the_standard_library():
    text = code_prompt(20_000, seed=2).text
    assert count(text) == 20_000
    library = [path for path in Path(os.__file__).parent.rglob("*.py") if "test" not in path.parts]
    sources = [path.read_bytes().decode(errors="replace").strip() for path in library]
    firsts = [code_prompt(5000, seed=seed).text for seed in range(3)]
    assert len(set(firsts)) == 3
    for first in firsts:
        assert any(first.startswith(source[:1000]) for source in sources if len(source) > 99)


def test_few_texts_are_counted_on_the_way_to_the_size():
    calls = []

    def tokens(text):
        calls.append(len(text))
        return sum(1 + len(word) // 4 for word in text.split())

    fit_prompt(lambda size: code_prompt(size, seed=1), tokens, 100_000)
    assert len(calls) < 16
    assert max(calls) < 1.5 * calls[-1]


def test_a_passage_goes_on_with_the_beginning_and_never_repeats():
    words = count(BOOK)
    assert sorted(book_prompt(BOOK, words, seed=1).text.split()) == sorted(BOOK.split())
    assert book_prompt(BOOK, 2 * words, seed=1) == book_prompt(BOOK, words, seed=1)


def test_texts_that_are_too_short_or_prompts_too_long_are_told():
    with pytest.raises(UserError, match=r"has only \d+ tokens, 99999 were asked for"):
        fit_prompt(lambda size: book_prompt(BOOK, size, seed=0), count, 99999)
    with pytest.raises(UserError, match="shortest such prompt has"):
        fit_prompt(lambda size: key_value_prompt(size, seed=0), count, 3)


def test_a_book_is_read_for_tasks_that_need_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert book_of(("code", "multi_needle"), path) == "one"
    assert book_of(("needle",), None) == BOOK
    assert book_of(("code", "key_value"), None) == ""
    with pytest.raises(UserError, match="--text belongs to --tasks book, multi_needle, needle"):
        book_of(("code", "key_value"), path)


def test_books_are_files_or_folders(tmp_path):
    for name, text in (("b.txt", "two"), ("a.txt", "one\n"), ("c.md", "no")):
        (tmp_path / name).write_text(text)
    assert read_book(tmp_path) == "one\n\ntwo"
    assert read_book(tmp_path / "b.txt") == "two"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("empty", "blank"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "blank" / name).write_text(" \n")
    for path, words in (
        ("bad.txt", "not UTF-8"), (".", "bad.txt is not UTF-8"), ("empty", "no .txt file"),
        ("blank", "holds no text"), ("none.txt", "No such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_book(tmp_path / path)


def test_the_lead_is_what_stands_before_the_answer():
    prompt = needle_prompt(packaged_chapter(), 300, seed=3)
    assert prompt.text.count(prompt.lead + prompt.answer) == 1
    assert prompt.answer not in prompt.lead
