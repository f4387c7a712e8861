"""RULER samples have the wanted length and hold what they ask for; scores are those published."""

import collections
import json
import re

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.common.prompts import packaged_chapter
from experiments.ruler import (
    effective_length,
    missing_files,
    read_questions,
    sample_maker,
    score,
    tasks,
)
from models.common.tokenizer_gguf import tokenizer_from_gguf
from tests.models.test_tokenizer import gpt2_metadata, sentencepiece_metadata

TEXT = packaged_chapter()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.(?=\s)")
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def words(text):
    return len(text.split())


def tokens_of(metadata):
    tokenizer = tokenizer_from_gguf(metadata)
    return lambda text: len(tokenizer.encode(text))


COUNTS = {
    "words": (words, 3000),
    "bytes": (tokens_of(gpt2_metadata()), 12_000),
    "sentencepiece": (tokens_of(sentencepiece_metadata()[0]), 7000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets of the published forms: 30 articles of 4 paragraphs, 12 questions of 10."""
    path = tmp_path_factory.mktemp("questions")
    paragraph = lambda n: " ".join(f"p{n}w{i}" for i in range(40))
    qas = lambda n: [
        {
            "question": f"What is in {n}?",
            "answers": [{"text": f"p{n}w3"}, {"text": f"p{n}w3"}, {"text": f"p{n}w4"}],
            "is_impossible": False,
        },
        {"question": "What is nowhere?", "answers": [], "is_impossible": True},
    ]
    articles = [
        {"paragraphs": [{"context": paragraph(n), "qas": qas(n)} for n in range(4 * a, 4 * a + 4)]}
        for a in range(30)
    ]
    (path / "squad.json").write_text(json.dumps({"data": articles}))
    rows = [
        {
            "question": f"Who is {n}?",
            "answer": f"a{n}",
            "context": [[f"t{n}.{i}", [f"a{n} {i}. ", paragraph(i)]] for i in range(10)],
        }
        for n in range(12)
    ]
    (path / "hotpotqa.json").write_text(json.dumps(rows))
    return path


def samples(task, folder=None, count=words, length=3000, number=1, seed=0, text=None):
    questions = None if folder is None else read_questions(task, folder)
    make = sample_maker(task, lambda *parts: count("".join(parts)), length, seed, text, questions)
    return [make(index) for index in range(number)]


def test_there_are_thirteen_tasks():
    assert len(tasks) == 13
    for name, task in tasks.items():
        assert task.max_new_tokens == NEW_TOKENS[name.split("_")[0]]


@pytest.mark.parametrize("tokenizer", COUNTS)
@pytest.mark.parametrize("task", tasks)
def test_prompt_and_answer_take_the_length_within_one_per_cent(task, tokenizer, folder):
    count, length = COUNTS[tokenizer]
    for sample in samples(task, folder, count, length, number=2):
        taken = count(sample.prompt + sample.lead) + sample.max_new_tokens
        assert 0.99 * length <= taken <= length
        assert (sample.task, sample.length) == (task, length)


@pytest.mark.parametrize("task", tasks)
def test_the_seed_decides(task, folder):
    first = samples(task, folder, length=2000, number=2)
    assert first == samples(task, folder, length=2000, number=2)
    assert first[0].prompt != samples(task, folder, length=2000, seed=1)[0].prompt
    assert first[0].prompt != first[1].prompt
    assert first[0].name != first[1].name
    assert first[1].prompt == samples(task, folder, length=2000, number=3)[1].prompt


NEEDLES = {  # needles in all but a haystack of needles, keys asked for, right answers, value
    "niah_single_1": (1, 1, 1, r"\d{7}"),
    "niah_single_2": (1, 1, 1, r"\d{7}"),
    "niah_single_3": (1, 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "niah_multikey_1": (4, 1, 1, r"\d{7}"),
    "niah_multikey_2": (None, 1, 1, r"\d{7}"),
    "niah_multikey_3": (None, 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "niah_multivalue": (4, 1, 4, r"\d{7}"),
    "niah_multiquery": (4, 4, 4, r"\d{7}"),
}


@pytest.mark.parametrize("length", [700, 1501, 3000])
@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_whole_and_those_asked_for_are_the_answers(task, length):
    needles, keys, answers, value = NEEDLES[task]
    for sample in samples(task, length=length, number=5):
        found = NEEDLE.findall(sample.prompt)
        assert len(found) == (needles or len(found))
        assert sample.prompt.count("special magic") == len(found) + 2  # in opening and question
        question = sample.prompt.rsplit("\n", 1)[1]
        asked = re.split(r", and |, ", re.search(r" for (.+) mentioned", question)[1])
        assert len(set(asked)) == keys
        assert len(sample.answers) == answers
        assert {v for _, key, v in found if key in asked} == set(sample.answers)
        assert all(re.fullmatch(value, answer) for answer in sample.answers)
        assert all(key in sample.lead for key in asked)
        plural = answers > 1
        assert sample.prompt.startswith("Some special" if plural else "A special")
        assert sample.lead.endswith("text are" if plural else "text is")


def test_a_haystack_of_needles_holds_nothing_else_but_a_last_filling():
    for task in ("niah_multikey_2", "niah_multikey_3"):
        [sample] = samples(task)
        lines = sample.prompt.splitlines()[1:-1]
        needles = [line for line in lines if NEEDLE.sub("", line + "\n") == "\n"]
        assert lines[: len(needles)] == [line for line in lines if "magic" in line]
        assert len(lines) - len(needles) <= 1
        assert len(needles) > 200


def sentences_around(sample):
    """Numbers of sentences before each needle, and of all, needles apart."""
    context = sample.prompt.split("\n")[1]
    parts = NEEDLE.sub("\0", context).split("\0")
    ends = [len(re.findall(r"[.!?][\"'\u201d\u2019)]?(?=\s|$)", part)) for part in parts]
    return np.cumsum(ends)[:-1], sum(ends)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1"])
def test_needles_of_a_text_stand_at_forty_depths_and_everywhere(task):
    drawn = samples(task, number=25)
    depths = []
    for sample in drawn:
        before, total = sentences_around(sample)
        for place in before:
            nearest = [round(d) * total / 100 for d in np.linspace(0, 100, 40)]
            assert min(abs(place - depth) for depth in nearest) <= 1
            depths.append(place / total)
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert np.histogram(depths, 4, (0, 1))[0].min() > 0


def test_a_text_is_read_from_its_beginning_and_not_repeated():
    [sample] = samples("niah_single_2")
    context = NEEDLE.sub("", sample.prompt.split("\n")[1])
    assert " ".join(TEXT.split()).startswith(" ".join(context.split()))
    with pytest.raises(UserError, match=r"has only \d+ tokens.*name a longer one with --text"):
        samples("niah_single_2", length=5000)


def test_a_chain_of_variables_is_whole_and_in_order():
    for sample in samples("vt", length=1000, number=8):
        example, question = sample.prompt.split("\n\nMemorize")
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", question)[1]
        names = []
        for new, old in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", question, re.MULTILINE):
            assert old == (names[-1] if names else value)
            names.append(new)
        assert tuple(names) == sample.answers
        assert len(set(names)) == 5
        assert {len(name) for name in names} == {5}
        assert example.endswith("they are: " + " ".join(re.findall(r"VAR (\w{3}) =", example)))
        assert value not in example
        assert f"5 variables are assigned the value {value}, they are:" in sample.lead
        rest = question.split("\n\n")[1].split("\nQuestion")[0]
        noise = [line for line in rest.splitlines() if not line.startswith("VAR")]
        assert set(noise[:-1]) == {NOISE}
        assert NOISE.startswith(noise[-1])


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(2000, 6, 1, (3, 1)), (5000, 30, 3, (10, 3))]
)
def test_common_words_stand_more_often_than_all_others(length, often, seldom, example):
    for sample in samples("cwe", length=length, number=2):
        lists = re.findall(r"^1\. .*$", sample.prompt, re.MULTILINE)
        assert len(lists) == 2
        for line, (much, little) in zip(lists, (example, (often, seldom)), strict=True):
            entries = re.findall(r"(\d+)\. (\S+)", line)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            counts = collections.Counter(word for _, word in entries).most_common()
            assert {n for _, n in counts[:10]} == {much}
            assert {n for _, n in counts[10:-1]} == {little}
            assert 1 <= counts[-1][1] <= little
        assert {word for word, _ in counts[:10]} == set(sample.answers)
        shown = sample.prompt.split("list are: ")[1].split("\n")[0]
        assert len(re.findall(r"\d+\. \w+", shown)) == 10


def test_words_of_the_text_are_common_words_and_have_to_suffice():
    text = " ".join(f"Xylo my-word {a}{b}ox" for a in "abcdef" for b in "abcdef")
    [sample] = samples("cwe", length=1900, text=text)
    listed = set(re.findall(r"\d+\. (\S+)", sample.prompt))
    assert {"abox", "ffox"} & listed
    assert not {"xylo", "word", "Xylo"} & listed
    with pytest.raises(UserError, match="name one with more different words with --text"):
        samples("cwe", length=9000, text=text)


@pytest.mark.parametrize("length", [500, 3000])
def test_frequencies_of_coded_words_follow_the_zeta_law(length):
    [sample] = samples("fwe", length=length)
    context = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
    counts = collections.Counter(context.split()).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == sample.answers
    assert counts[3][1] > counts[4][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    total = counts[0][1] * np.pi**2 / 6
    for rank, (_, number) in enumerate(counts, 1):
        assert number == pytest.approx(total * rank**-2.0 * 6 / np.pi**2, abs=1)


def test_documents_of_a_question_are_whole_and_others_fill_the_rest(folder):
    for sample in samples("qa_1", folder, length=1000, number=6):
        documents = re.findall(r"Document \d+:\n(.*)", sample.prompt)
        numbers = [int(re.match(r"p(\d+)w0", text)[1]) for text in documents]
        question = int(re.search(r"What is in (\d+)\?$", sample.prompt)[1])
        assert sample.answers == (f"p{question}w3", f"p{question}w4")
        own = documents[numbers.index(question)]
        assert own == " ".join(f"p{question}w{i}" for i in range(40))
        assert sum(not text.endswith("w39") for text in documents) <= 1
        assert len(set(numbers)) == len(numbers)
        article = set(range(question - question % 4, question - question % 4 + 4))
        assert article <= set(numbers)
        assert "nowhere" not in sample.prompt


def test_hotpot_questions_have_all_their_paragraphs(folder):
    for index, sample in enumerate(samples("qa_2", folder, length=1500, number=3)):
        assert sample.answers == (f"a{index}",)
        for i in range(10):
            assert f":\nt{index}.{i}\na{index} {i}. p{i}w0" in sample.prompt
            assert re.search(rf"\nt{index}\.{i}\n.* p{i}w39\n", sample.prompt)


def test_questions_that_are_absent_are_told(folder, tmp_path):
    assert missing_files(tasks, folder) == {}
    both = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
    assert missing_files(tasks, None) == missing_files(tasks, tmp_path) == both
    assert missing_files(["vt"], None) == {}
    assert read_questions("vt", None) is None
    with pytest.raises(UserError, match=r"qa_1 needs a folder with squad\.json"):
        read_questions("qa_1", None)
    with pytest.raises(UserError, match="cannot read"):
        read_questions("qa_2", tmp_path)
    with pytest.raises(UserError, match="there are no questions"):
        samples("qa_1")
    with pytest.raises(UserError, match="there are 12 questions; ask for at most"):
        samples("qa_2", folder, length=2000, number=13)
    with pytest.raises(UserError, match="ask for fewer: there are no more documents"):
        samples("qa_1", folder, length=50_000)


@pytest.mark.parametrize(("task", "read"), [("qa_1", "SQuAD"), ("qa_2", "HotpotQA")])
def test_files_that_are_no_data_sets_are_told(task, read, tmp_path):
    (tmp_path / "squad.json").write_text('{"rows": []}')
    (tmp_path / "hotpotqa.json").write_text('[{"question": "?"}]')
    with pytest.raises(UserError, match=f"is not {read}"):
        read_questions(task, tmp_path)


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "qa_1"])
def test_lengths_that_hold_no_sample_are_told(task, folder):
    with pytest.raises(UserError, match="shortest such prompt has"):
        samples(task, folder, length=60)


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "expected"),
    [
        ("vt", "ABC, def; (GHI)", ("abc", "DEF", "ghi"), 1),
        ("vt", "ABC", ("abc", "DEF", "ghi"), 1 / 3),
        ("niah_multivalue", "1234567\n7654321.", ("1234567", "7654321", "1111111", "2"), 0.75),
        ("niah_single_1", "it is 12345678", ("1234567",), 1),
        ("cwe", "", ("one", "two"), 0),
        ("fwe", "aaaaaa bbbbbb", ("cccccc",), 0),
        ("qa_1", "In NEW YORK!", ("york city", "new york"), 1),
        ("qa_2", "no", ("yes",), 0),
        ("qa_2", "", ("yes", "no"), 0),
    ],
)
def test_scores_are_shares_of_answers_or_whether_any_is_there(task, prediction, answers, expected):
    assert score(task, prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("answers", [(), ("",), ("a", "")])
def test_no_answer_cannot_be_scored(answers):
    with pytest.raises(ValueError, match="expected answers that are not empty"):
        score("vt", "a", answers)


def test_effective_length_ends_where_averages_first_fail():
    averages = {16384: 0.87, 4096: 0.95, 8192: 0.9, 32768: 0.856, 65536: 0.99}
    assert effective_length(averages) == 16384
    assert effective_length({4096: 0.85}) is None
    assert effective_length({4096: 0.85}, threshold=0.8) == 4096
