"""RULER: 13 synthetic tasks of any length, and their scores."""

from experiments.ruler.samples import Task, build_samples, missing_files, read_questions, tasks
from experiments.ruler.scores import effective_length, score

__all__ = [
    "Task",
    "build_samples",
    "effective_length",
    "missing_files",
    "read_questions",
    "score",
    "tasks",
]
