"""Samples of InfiniteBench: read from released files, cut to a length, made at a length."""

import ast
import json
import re
import statistics

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as backends

from experiments.common.errors import UserError
from experiments.infinitebench import (
    SYNTHETIC,
    TASKS,
    check_file,
    read_sample,
    sample_maker,
    score,
)
from experiments.infinitebench.tasks import MAX_NEW_TOKENS
from models.common.tokenizer import Tokenizer

TEMPLATE = 7  # tokens that the stand-in for a chat template adds
INPUTS = {
    "passkey": "What is the pass key?",
    "math_find": "Answer with one number. The second largest number of the list is: ",
    "code_run": "Please give me the exact number of the return value of func_12(-3).",
}
OPTIONS = ["first {option}", "second", "third", "fourth"]


def byte_tokenizer():
    """One token for each byte, as many for a Chinese character as UTF-8 takes."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(backends.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend=backend)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def count_bytes(prompt, lead=""):
    return len((prompt + lead).encode()) + TEMPLATE


def record(task, **changes):
    values = {
        "id": 3,
        "context": "Long {text} of many words.",
        "input": INPUTS.get(task, "Who?"),
        "answer": ["4"],
        "options": [],
    }
    if task in ("longbook_choice_eng", "code_debug"):
        values |= {"options": OPTIONS, "answer": ["second"]}
    return values | changes


def write(tmp_path, *records):
    path = tmp_path / "task.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path, task, tokenizer, length=100_000, **options):
    released = check_file(path, task, **options)
    return [
        read_sample(released, place, tokenizer=tokenizer, count_tokens=count_bytes, length=length)
        for place in range(len(released.starts))
    ]


def made(task, length, number, seed):
    make = sample_maker(task, count_words, length, number, seed)
    return [make(place) for place in range(number)]


@pytest.fixture
def with_rouge(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.usefixtures("with_rouge")
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_the_text_and_what_is_asked(tmp_path, tokenizer, task):
    path = write(tmp_path, record(task), record(task, context="Other text."))
    assert len(check_file(path, task).starts) == 2
    first, second = read(path, task, tokenizer)
    assert first.name != second.name
    assert first.task == task
    assert "Long {text} of many words." in first.prompt
    assert "Other text." in second.prompt
    assert first.max_new_tokens == MAX_NEW_TOKENS[task]
    if task in ("longbook_choice_eng", "code_debug"):
        lines = first.prompt.splitlines()[-4:]
        assert lines == ["A. first {option}", "B. second", "C. third", "D. fourth"]
        assert first.answers == ("second", "B")
    else:
        assert first.answers == ("4",)
    asked = {
        "longbook_sum_eng": "Summarize",
        "longdialogue_qa_eng": "$$MASK$$",
        "math_find": "What is the second largest number in the following list?",
        "math_calc": "\nExpression: Long {text}",
        "code_debug": "Options:",
        "code_run": "func_12(-3)",
    }
    assert asked.get(task, INPUTS.get(task, "Who?")) in first.prompt
    assert "{" not in first.lead
    assert not first.lead.endswith(" ")  # or the answer would begin with another token


def test_leads_name_what_is_asked(tmp_path, tokenizer):
    [sample] = read(write(tmp_path, record("code_run")), "code_run", tokenizer)
    assert sample.lead == "\n\nThe value of func_12(-3) is"
    [sample] = read(write(tmp_path, record("passkey")), "passkey", tokenizer)
    assert sample.lead == "\n\nThe pass key is"


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        (-14, ("-14",)),
        ([4, 8], ("4", "8")),
        (49.5, ("49.5",)),
    ],
)
def test_answers_are_texts_and_numbers(tmp_path, tokenizer, answer, answers):
    path = write(tmp_path, record("passkey", answer=answer))
    assert read(path, "passkey", tokenizer)[0].answers == answers


@pytest.mark.parametrize("answer", ["second", ["second"], ["second", "B"]])
def test_the_letter_of_the_right_option(tmp_path, tokenizer, answer):
    path = write(tmp_path, record("code_debug", answer=answer))
    assert read(path, "code_debug", tokenizer)[0].answers == ("second", "B")


def test_only_the_first_samples_are_read(tmp_path, tokenizer):
    path = write(tmp_path, record("passkey"), "", record("passkey"), "not JSON")
    assert len(check_file(path, "passkey", number=2).starts) == 2
    assert len(read(path, "passkey", tokenizer, number=2)) == 2
    with pytest.raises(UserError, match="line 4: not JSON"):
        check_file(path, "passkey")


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("passkey", "{", "line 2: not JSON"),
        ("passkey", "[1]", "line 2: expected a JSON object, got list"),
        ("passkey", {"context": "a", "answer": "b"}, "line 2: expected text as `input`, got null"),
        ("passkey", record("passkey", context=[1]), r"expected text as `context`, got \[1\]"),
        ("passkey", record("passkey", answer=[]), r"line 2: expected text, a number, .* got \[\]"),
        ("passkey", record("passkey", answer=[True]), r"got \[true\]"),
        ("passkey", record("passkey", answer={"a": 1}), "as `answer`, got"),
        ("code_debug", record("code_debug", options=["a"]), "line 2: expected four texts"),
        ("code_debug", record("code_debug", answer="fifth"), "expected one of the options"),
        ("code_run", record("code_run", input="What?"), "line 2: expected a call such as"),
        ("math_find", record("math_find", input="What?"), "line 2: expected `The ... number of`"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, tokenizer, task, line, words):
    path = write(tmp_path, record(task), line)
    with pytest.raises(UserError, match=words):
        check_file(path, task)
    with pytest.raises(UserError, match=words):
        read(path, task, tokenizer)


def test_unusable_files_are_told(tmp_path):
    with pytest.raises(UserError, match="no task 'novel'"):
        check_file(write(tmp_path, record("passkey")), "novel")
    with pytest.raises(UserError, match=r"none.jsonl: No such file.*passkey needs passkey.jsonl"):
        check_file(tmp_path / "none.jsonl", "passkey")
    with pytest.raises(UserError, match="holds no sample of passkey"):
        check_file(write(tmp_path, ""), "passkey")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        check_file(binary, "passkey")


WORDS = " ".join(f"w{i}" for i in range(2000))
SIGNS = "".join(chr(0x4E00 + i) for i in range(2000))


@pytest.mark.usefixtures("with_rouge")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context", [WORDS, SIGNS], ids=["english", "chinese"])
def test_truncation_keeps_both_ends_and_the_question(tmp_path, tokenizer, task, context):
    length = 2000 + MAX_NEW_TOKENS[task]
    path = write(tmp_path, record(task, context=context))
    [whole] = read(path, task, tokenizer, length=10**6)
    [sample] = read(path, task, tokenizer, length=length)
    assert (sample.lead, sample.answers) == (whole.lead, whole.answers)
    assert (sample.length, whole.length) == (length, 10**6)
    before, after = whole.prompt.split(context)
    assert sample.prompt.startswith(before + context[:100])
    assert sample.prompt.endswith(context[-100:] + after)
    # Nothing but the middle is missing, and it is the middle of the prompt and its lead.
    kept = sample.prompt.removeprefix(before).removesuffix(after)
    head = next(i for i, (a, b) in enumerate(zip(kept, context, strict=False)) if a != b)
    assert context.endswith(kept[head:])
    first = len((before + kept[:head]).encode())
    second = len((kept[head:] + after + sample.lead).encode())
    assert abs(first - second) <= TEMPLATE + 3
    # The length is used, but for what a character takes.
    assert length - 6 <= count_bytes(sample.prompt + sample.lead) + sample.max_new_tokens <= length


def test_a_prompt_that_just_fits_is_whole(tmp_path, tokenizer):
    path = write(tmp_path, record("passkey", context=WORDS))
    [whole] = read(path, "passkey", tokenizer, length=10**6)
    length = count_bytes(whole.prompt + whole.lead) + whole.max_new_tokens
    assert read(path, "passkey", tokenizer, length=length)[0].prompt == whole.prompt
    assert WORDS not in read(path, "passkey", tokenizer, length=length - 1)[0].prompt


def test_the_question_is_never_cut(tmp_path, tokenizer):
    path = write(tmp_path, record("passkey", context=WORDS))
    [shortest] = read(write(tmp_path, record("passkey", context="")), "passkey", tokenizer)
    length = count_bytes(shortest.prompt + shortest.lead) + shortest.max_new_tokens
    path = write(tmp_path, record("passkey", context=WORDS))
    assert read(path, "passkey", tokenizer, length=length)[0].prompt == shortest.prompt
    with pytest.raises(UserError, match="there is room for"):
        read(path, "passkey", tokenizer, length=length - 1)


def count_words(prompt, lead=""):
    return len(re.findall(r"\d{1,3}|\w+|[^\w\s]", prompt + lead)) + TEMPLATE


@pytest.mark.parametrize("task", SYNTHETIC)
@pytest.mark.parametrize("length", [9_000, 30_000])
def test_made_samples_have_the_length(task, length):
    samples = made(task, length, 3, 0)
    assert len({sample.name for sample in samples}) == 3
    for sample in samples:
        tokens = count_words(sample.prompt + sample.lead) + sample.max_new_tokens
        assert 0.99 * length < tokens <= length
        assert (sample.task, sample.length) == (task, length)


@pytest.mark.parametrize("task", SYNTHETIC)
def test_the_seed_decides(task):
    first, second = made(task, 2000, 2, 1)
    make = sample_maker(task, count_words, 2000, 2, 1)
    assert [make(1), make(0)] == [second, first]
    assert first.prompt != made(task, 2000, 2, 2)[0].prompt
    assert first.answers != second.answers


@pytest.mark.parametrize("task", SYNTHETIC)
def test_the_answer_is_in_the_prompt_and_scores_one(task):
    for sample in made(task, 2000, 3, 5):
        if task != "math_find":  # a median need not be in the list
            assert sample.answers[0] in sample.prompt
        assert score(task, f" {sample.answers[0]}.", sample.answers) == 1


@pytest.mark.parametrize("task", ["passkey", "number_string", "kv_retrieval"])
def test_depths_spread_over_the_text(task):
    places = [
        sample.prompt.index(sample.answers[0]) / len(sample.prompt)
        for sample in made(task, 6000, 5, 0)
    ]
    assert places == pytest.approx([0.03, 0.25, 0.5, 0.75, 0.97], abs=0.04)


def test_number_strings_have_ten_digits_in_pairs():
    for sample in made("number_string", 500, 3, 0):
        [digits] = sample.answers
        assert digits[::2] == digits[1::2]
        assert len(digits) == 10


def test_values_belong_to_the_keys_that_are_asked_for():
    for sample in made("kv_retrieval", 2000, 3, 0):
        pairs = json.loads(re.search(r"\{.*\}", sample.prompt).group())
        key = re.search(r'Key: "(.*)"', sample.prompt).group(1)
        assert sample.answers == (pairs[key],)


def test_numbers_asked_for_are_right():
    order = {"": 0, "second ": 1, "third ": 2}
    kinds = set()
    for sample in made("math_find", 1500, 14, 0):
        numbers = ast.literal_eval(re.search(r"\[.*\]", sample.prompt).group())
        kind = re.search(r"What is the (.*) number in", sample.prompt).group(1)
        kinds.add(kind)
        if kind == "median":
            right = statistics.median(numbers)
        else:
            name = kind.removesuffix("largest").removesuffix("smallest")
            distinct = sorted(set(numbers), reverse=kind.endswith("largest"))
            right = distinct[order[name]]
        assert float(sample.answers[0]) == right
    assert len(kinds) == 7


def test_samples_that_cannot_be_made_are_told():
    with pytest.raises(UserError, match=r"longbook_qa_eng cannot be made.*passkey, number_string"):
        made("longbook_qa_eng", 1000, 1, 0)
    with pytest.raises(UserError, match="no task 'keys'"):
        made("keys", 1000, 1, 0)
    with pytest.raises(UserError, match="at least 1 sample of passkey, got 0"):
        made("passkey", 1000, 0, 0)
    with pytest.raises(UserError, match="passkey cannot be made of 40 tokens"):
        made("passkey", 40, 1, 0)
