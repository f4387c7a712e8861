"""The tasks of InfiniteBench, and how many tokens an answer may take."""

from typing import Literal, get_args

from experiments.common.errors import UserError

Task = Literal[
    "passkey",
    "number_string",
    "kv_retrieval",
    "longbook_sum_eng",
    "longbook_choice_eng",
    "longbook_qa_eng",
    "longbook_qa_chn",
    "longdialogue_qa_eng",
    "math_find",
    "math_calc",
    "code_debug",
    "code_run",
]
TASKS: tuple[Task, ...] = get_args(Task)
# Tasks that ask for one of four options.
CHOICES: frozenset[Task] = frozenset({"longbook_choice_eng", "code_debug"})
# Tasks whose samples can be made at any length.
SYNTHETIC: tuple[Task, ...] = ("passkey", "number_string", "kv_retrieval", "math_find")
LETTERS = "ABCD"

# As in MInference's evaluation; math_calc and code_run, which it leaves out, as in InfiniteBench's.
MAX_NEW_TOKENS: dict[Task, int] = {
    "passkey": 15,
    "number_string": 20,
    "kv_retrieval": 80,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longdialogue_qa_eng": 40,
    "math_find": 3,
    "math_calc": 30000,
    "code_debug": 5,
    "code_run": 5,
}


def check_task(name: str) -> Task:
    """Returns a task's name; raises UserError if there is no such task."""
    for task in TASKS:
        if task == name:
            return task
    raise UserError(f"InfiniteBench has no task {name!r}; its tasks are: {', '.join(TASKS)}")


def sample_name(task: str, length: int, place: int) -> str:
    """Returns the name of a sample."""
    return f"{task}-{length}-{place}"
