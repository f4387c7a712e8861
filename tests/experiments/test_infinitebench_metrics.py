"""Each metric on answers whose score is known by hand."""

import pytest

from experiments.common.errors import UserError
from experiments.infinitebench import TASKS, check_metric, score
from experiments.infinitebench import metrics as metrics_module

BOOK = ("At the opera", "C")
CODE = ("load_config", "B")


@pytest.mark.parametrize("task", ["passkey", "number_string"])
@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" 71432. Remember it.", 1),
        ("key 71432 or 5", 1),
        ("5 or 71432", 0),
        ("714321", 0),
        ("7 1432", 0),
        ("none", 0),
        ("", 0),
    ],
)
def test_the_first_integer_is_compared_as_text(task, prediction, right):
    assert score(task, prediction, ("71432",)) == right
    assert score(task, prediction, ("71432", "5")) == right  # only the first answer is looked at
    assert score(task, "0042", ("42",)) == 0


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ('"ab-12".', 1),
        ("it is:ab-12", 1),
        ("Theab-12", 1),
        ("AB-12", 0),
        ("ab-123", 0),
        ("(ab-12)", 0),
        ("", 0),
    ],
)
def test_a_value_is_a_word_of_the_answer(prediction, right):
    assert score("kv_retrieval", prediction, ("ab-12",)) == right
    assert score("kv_retrieval", prediction, ("cd-34", "ab-12")) == right


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("C. At the opera", 1),
        (" C", 1),
        ("Cats", 1),  # the first letter decides
        ("B", 0),
        ("At the opera", 0),  # for its first letter, A
        ("the answer is C", 1),
        ("the answer is: At the opera", 1),
        ("the answer is", 0),
        ("the option is B, not C", 0),
        ("perhaps C or B", 1),
        ("perhaps B or C", 0),
        ("perhaps (C)", 0),
        ("c", 0),
        ("", 0),
        ("\n", 0),
    ],
)
def test_choice(prediction, right):
    assert score("longbook_choice_eng", prediction, BOOK) == right


def test_an_option_may_be_answered_with_its_words():
    assert score("longbook_choice_eng", "in Rome", ("in Rome", "C")) == 1
    assert score("longbook_choice_eng", "in rome", ("in Rome", "C")) == 0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The old man", 1.0),
        ("THE OLD, MAN!", 1.0),
        ("man", 2 / 3),
        ("an old old man", 4 / 5),  # articles do not count, words do as often as they occur
        ("nobody", 0.0),
        ("", 0.0),
        ("the", 0.0),
    ],
)
def test_english_f1(prediction, expected):
    assert score("longbook_qa_eng", prediction, ("old man",)) == pytest.approx(expected)


def test_f1_takes_the_best_of_several_answers():
    assert score("longbook_qa_eng", "in Paris", ("Lyon", "Paris")) == pytest.approx(2 / 3)
    assert score("longbook_qa_chn", "李白", ("杜甫", "李白")) == 1.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("王小明", 1.0), ("“王 小明”。", 1.0), ("王明", 4 / 5), ("李", 0.0), ("", 0.0)],
)
def test_chinese_f1_counts_characters(prediction, expected):
    assert score("longbook_qa_chn", prediction, ("王小明",)) == pytest.approx(expected)


def test_chinese_f1_knows_case_and_the_published_punctuation():
    assert score("longbook_qa_chn", "（ＡＢ）ab", ("ＡＢAB",)) == 1.0  # noqa: RUF001
    assert score("longbook_qa_chn", "书》", ("书",)) == 1.0
    assert score("longbook_qa_chn", "《书", ("书",)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("john", 1), (" John, I think", 1), ("JOHN:", 1), ("Johnny", 0), ("Mary", 0), ("", 0)],
)
def test_a_name_in_any_case_is_found(prediction, right):
    assert score("longdialogue_qa_eng", prediction, ("JOHN",)) == right
    assert score("longdialogue_qa_eng", prediction, ("JOHN", "MARY")) == right


def test_a_name_of_two_words_is_never_found():
    assert score("longdialogue_qa_eng", "JOHN DOE", ("JOHN DOE",)) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        (" 42", "42", 1),
        ("it is 42.", "42", 1),
        ("42.9", "42", 1),  # integers are compared with integer parts
        ("4", "42", 0),
        ("7, 42", "42", 0),
        ("49.5", "49.5", 1),
        ("49", "49.0", 1),
        ("49", "49.5", 0),
        ("", "42", 0),
    ],
)
def test_the_first_number_counts(prediction, answer, right):
    assert score("math_find", prediction, (answer,)) == right


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[4, 8, 15]", 1.0),
        ("4 8", 2 / 3),
        ("4, 9, 15", 1 / 3),  # nothing counts after the first wrong value
        ("1, 4, 8, 15", 0.0),
        ("4, 8, 15, 16", 1.0),
        ("", 0.0),
    ],
)
def test_the_right_values_before_the_first_wrong_one_count(prediction, expected):
    assert score("math_calc", prediction, ("4", "8", "15")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B. load", 1),
        (" B:", 1),
        ("B", 0),
        ("b. load_config", 0),
        ("A. load_config", 0),
        ("The answer is: B", 1),
        ("The error is: `load_config`", 1),
        ("The answer is: Load_config", 0),
        ("The answer is: Option B", 1),
        ("answer:", 0),
        ("load_config", 0),
        ("", 0),
    ],
)
def test_code_debug(prediction, right):
    assert score("code_debug", prediction, CODE) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        (" -14.", "-14", 1),
        ("func_1(2) = -14", "-14", 1),
        ("-14 or 3", "-14", 0),  # the last word counts
        ("14", "-14", 0),
        ("12.5", "5", 1),
        ("twelve", "12", 0),
        ("", "12", 0),
    ],
)
def test_code_run(prediction, answer, right):
    assert score("code_run", prediction, (answer,)) == right


def test_summaries_are_scored_by_the_longest_common_subsequences_of_their_lines():
    pytest.importorskip("rouge_score")
    reference = "the cat sat\nthe dog slept"
    assert score("longbook_sum_eng", "The cat sat.\nThe dog slept.", (reference,)) == 1.0
    # 4 of 6 words on either side.
    assert score("longbook_sum_eng", "the cat sat\na dog ran", (reference,)) == pytest.approx(2 / 3)
    # Lines may change places, which for one sequence they may not.
    assert score("longbook_sum_eng", "the dog slept\nthe cat sat", (reference,)) == 1.0
    assert score("longbook_sum_eng", "", (reference,)) == 0.0


def test_without_its_package_a_summary_is_not_scored(monkeypatch):
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"minference-jax\[evaluation\]"):
        check_metric("longbook_sum_eng")
    with pytest.raises(UserError, match="rouge-score"):
        score("longbook_sum_eng", "a", ("a",))
    check_metric("passkey")


def test_bad_calls_are_told():
    with pytest.raises(UserError, match="no task 'passkeys'; its tasks are: passkey, "):
        score("passkeys", "1", ("1",))
    with pytest.raises(UserError, match="at least one right answer"):
        score("passkey", "1", ())


@pytest.mark.parametrize("task", [task for task in TASKS if task != "longbook_sum_eng"])
def test_every_task_scores_a_right_answer_one_and_silence_zero(task):
    answers = {
        "longbook_choice_eng": BOOK,
        "code_debug": CODE,
        "longdialogue_qa_eng": ("JOHN",),
        "longbook_qa_chn": ("王",),
    }.get(task, ("12",))
    right = "B." if task == "code_debug" else "C" if answers == BOOK else answers[0]
    assert score(task, right, answers) == 1.0
    assert score(task, "", answers) == 0.0
