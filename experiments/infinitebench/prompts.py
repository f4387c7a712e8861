"""The prompt of each task: instruction, long text, question, and how the answer begins."""

import dataclasses
import re

from experiments.common.errors import UserError
from experiments.infinitebench.tasks import LETTERS, Task

# Prompts, and how answers begin. The structure is that of InfiniteBench's prompts for open models,
# but math_calc: there the examples begin with the first number, the right answers after the first
# operation, so that a model that follows the examples scores nothing.
_PROMPTS: dict[Task, tuple[str, str]] = {
    "passkey": (
        "Somewhere in a lot of irrelevant text there is important information. Find it and "
        "memorize it. I will ask you about it.\n\n{context}\n\n{asked}",
        "\n\nThe pass key is",
    ),
    "number_string": (
        "Somewhere in a lot of irrelevant text there is important information. Find it. "
        "I will ask you about it.\n\n{context}\n\n{asked}",
        "\n\nThe sequence of digits is",
    ),
    "kv_retrieval": (
        "Find the value of the specified key in the JSON object below.\n\n{context}\n\n{asked}",
        "",
    ),
    "longbook_sum_eng": ("Summarize the following book.\n\n{context}", "\n\nSummary:"),
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {asked}\n{choices}",
        "\n\nThe letter of the correct answer is",
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question as concisely as you can.\n\n{context}\n\n"
        "Question: {asked}",
        "\nAnswer:",
    ),
    "longbook_qa_chn": (
        "请阅读下面的书，然后简短地回答问题。\n\n{context}\n\n问题：{asked}",  # noqa: RUF001
        "\n答案：",  # noqa: RUF001
    ),
    "longdialogue_qa_eng": (
        "In the dialogue script below, the name of a character is replaced in one place with "
        '"$$MASK$$". Guess who that character is.\n\n{context}',
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
    ),
    "math_find": ("What is the {named} in the following list?\n\n{context}\n\n{asked}", ""),
    "math_calc": (
        "Calculate the values of an expression after each of its operations.\n\n"
        "Expression: 1 + 3 + 4\nValues: [4, 8]\n\nExpression: 8 - 3 + 2 - 4\nValues: [5, 7, 3]\n\n"
        "Expression: {context}",
        "\nValues:",
    ),
    "code_debug": (
        "In the following Python code exactly one function or method has a deliberate error that "
        "makes it crash.\n\n{context}\n\nOptions:\n{choices}",
        "\n\nThe correct option is:",
    ),
    "code_run": (
        "Below is Python code.\n\n{context}\n\nCompute the exact value of {named}.",
        "\n\nThe value of {named} is",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt in parts, of which only the context may be shortened.

    Attributes:
        before: instruction.
        context: long text.
        after: the question itself, with options.
        lead: how the answer begins, with what parts it from a prompt that no chat template ends.
        answers: right answers; of tasks with options, the right one and its letter.
    """

    before: str
    context: str
    after: str
    lead: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.before + self.context + self.after


def ask(
    task: Task, *, context: str, asked: str, options: tuple[str, ...] = (), answers: tuple[str, ...]
) -> Question:
    """Returns the question of a task.

    Args:
        task: the task.
        context: long text.
        asked: what the data set asks (its field `input`).
        options: four, for the tasks with options.
        answers: right answers.

    Raises:
        UserError: `asked` does not name what the task's prompt must name.
    """
    prompt, lead = _PROMPTS[task]
    before, _, after = prompt.partition("{context}")
    choices = "\n".join(f"{x}. {option}" for x, option in zip(LETTERS, options, strict=False))
    fill = lambda text: text.format(asked=asked, choices=choices, named=_named(task, asked))
    return Question(
        before=fill(before), context=context, after=fill(after), lead=fill(lead), answers=answers
    )


def _named(task: Task, asked: str) -> str:
    """The number or call that a question is about, where the prompt repeats it."""
    match task:
        case "math_find":
            return _found(r"The (.+) of", asked, "`The ... number of`").lower()
        case "code_run":
            return _found(r"(func_\d+\(-?\d+\))", asked, "a call such as `func_1(2)`")
        case _:
            return ""


def _found(pattern: str, asked: str, what: str) -> str:
    match = re.search(pattern, asked)
    if match is None:
        raise UserError(f"expected {what} in `input`, got {asked[:80]!r}")
    return match[1]
