"""RULER: 13 synthetic tasks of any length, and their scores."""

from experiments.ruler.samples import (
    Task,
    TaskName,
    missing_files,
    read_questions,
    sample_maker,
    sample_name,
    tasks,
)
from experiments.ruler.scores import effective_length, score

__all__ = [
    "Task",
    "TaskName",
    "effective_length",
    "missing_files",
    "read_questions",
    "sample_maker",
    "sample_name",
    "score",
    "tasks",
]
