"""How an answer is scored, task by task, as in the evaluation that MInference publishes.

Its metrics are InfiniteBench's, but for white space around an answer, which does not count. What
looks odd is theirs, and kept so that scores compare:

- passkey, number_string, math_find, longdialogue_qa_eng know one right answer, the first.
- longdialogue_qa_eng compares single words: a name of two words is never found.
- code_debug accepts a letter only with a full stop or a colon behind it.
"""

import functools
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from experiments.common.errors import UserError
from experiments.infinitebench.tasks import LETTERS, Task, check_task

# First and last characters: fullwidth, CJK and general punctuation that Chinese answers lose. The
# published list has gaps (such as the opening bracket of a book title), which are kept.
_CHINESE_PUNCTUATION = frozenset(
    chr(code)
    for first, last in (
        *((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40)),
        *((0xFF5B, 0xFF64), (0x3001, 0x3003), (0x300B, 0x3011), (0x3014, 0x301F)),
        *((0x3030, 0x3030), (0x303E, 0x303F), (0x2013, 0x2014), (0x2018, 0x2019)),
        *((0x201B, 0x201F), (0x2026, 0x2027), (0xFE4F, 0xFE4F)),
    )
    for code in range(first, last + 1)
)
_BETWEEN_WORDS = ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")


def check_metric(task: Task) -> None:
    """Raises UserError if a task's metric needs a package that is not installed."""
    if task == "longbook_sum_eng" and importlib.util.find_spec("rouge_score") is None:
        raise UserError(
            "longbook_sum_eng is scored with the package rouge-score, which is not installed; run "
            "pip install 'minference-jax[evaluation]', or leave the task out"
        )


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of one answer, from 0 to 1.

    Args:
        task: name of the task.
        prediction: what the model said after the beginning of the answer.
        answers: right answers; of tasks with options, the right one and its letter.

    Raises:
        UserError: there is no such task, no right answer, or the package that scores it is missing.
    """
    known = check_task(task)
    if not answers:
        raise UserError(f"{task}: a sample needs at least one right answer, got none")
    return float(_score(known, prediction, answers))


def _score(task: Task, prediction: str, answers: Sequence[str]) -> float | bool:
    match task:
        case "passkey" | "number_string":
            return _first_integer(prediction) == answers[0]
        case "kv_retrieval":
            words = _words(prediction, (*_BETWEEN_WORDS, "</s>", "The", "To"))
            return any(answer in words for answer in answers)
        case "longbook_sum_eng":
            check_metric(task)
            return max(_rouge(prediction, answer) for answer in answers)
        case "longbook_choice_eng":
            return _choice(prediction.strip(), answers)
        case "longbook_qa_eng":
            tokens = _english_words(prediction)
            return max(_f1(tokens, _english_words(answer)) for answer in answers)
        case "longbook_qa_chn":
            tokens = _chinese_characters(prediction)
            return max(_f1(tokens, _chinese_characters(answer)) for answer in answers)
        case "longdialogue_qa_eng":
            return answers[0] in [word.upper() for word in _words(prediction, _BETWEEN_WORDS)]
        case "math_find":
            return _finds_number(prediction, answers[0])
        case "math_calc":
            return _right_beginning(prediction, answers)
        case "code_debug":
            return _option(prediction.strip(), answers)
        case "code_run":
            words = _words(prediction, ("\n", ".", "`", "'", '"', ":"))
            return bool(words) and _integer(words[-1]) == int(answers[0])


def _first_integer(text: str) -> str:
    found = re.search("[0-9]+", text)
    return "" if found is None else found[0]


def _integer(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None


def _words(text: str, between: Sequence[str]) -> list[str]:
    """The words of a text in which some strings separate words, too."""
    return _spaced(text, between).split()


def _spaced(text: str, between: Sequence[str]) -> str:
    for mark in between:
        text = text.replace(mark, " ")
    return re.sub(" +", " ", text)


def _english_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_characters(text: str) -> list[str]:
    left_out = _CHINESE_PUNCTUATION.union(string.punctuation)
    return [c for c in text.lower() if c not in left_out and not c.isspace()]


def _f1(tokens: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(tokens) & Counter(right)).total()
    return 2 * same / (len(tokens) + len(right)) if same else 0.0


def _rouge(prediction: str, answer: str) -> float:
    return float(_rouge_scorer().score(answer, prediction)["rougeLsum"].fmeasure)  # 0 is an int


@functools.cache
def _rouge_scorer() -> Any:
    # Only for a task of many, and slow to import.
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"])


def _choice(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the first letter, else what follows `answer is`, else the first letter alone fits."""
    if prediction[:1] in tuple(LETTERS):
        return prediction[0] in answers
    if prediction in answers:
        return True
    text = _spaced(prediction, ("\n", '"', "'", ".", ",", "?", "!", "{", "}"))
    told = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if told is not None:
        return told.startswith(tuple(answers))
    letters = [word for word in text.split() if word in LETTERS]  # "AB" ends the search, too
    return bool(letters) and letters[0] in answers


def _option(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the letter comes first, with a mark, or letter or option follow `answer is:`."""
    _, letter = answers
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return True
    marks = ("\n", "`", "'", '"', "-", "*", "Option", "option")
    told = _after(_spaced(prediction, marks), ("answer is:", "is:", "answer:"))
    return told is not None and told.startswith(tuple(answers))


def _after(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the prefixes that occurs and one more character; None if none."""
    for prefix in prefixes:
        place = text.find(prefix)
        if place >= 0:
            return text[place + len(prefix) + 1 :]
    return None


def _finds_number(prediction: str, answer: str) -> bool:
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return False
    number, right = float(found[0]), float(answer)
    # An integer asked for is compared with the integer part.
    return (number if "." in answer else int(number)) == right


def _right_beginning(prediction: str, answers: Sequence[str]) -> float:
    """The share of the values that are right before the first wrong one."""
    values = [int(digits) for digits in re.findall("[0-9]+", prediction)]
    right = 0
    for value, answer in zip(values, answers, strict=False):
        if value != int(answer):
            break
        right += 1
    return right / len(answers)
