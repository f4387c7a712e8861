"""InfiniteBench (Zhang et al. 2024): prompts, samples and metrics of its 12 tasks."""

from experiments.infinitebench.build import sample_maker
from experiments.infinitebench.metrics import check_metric, score
from experiments.infinitebench.read import Released, check_file, read_sample
from experiments.infinitebench.tasks import SYNTHETIC, TASKS, Task, check_task, sample_name

__all__ = [
    "SYNTHETIC",
    "TASKS",
    "Released",
    "Task",
    "check_file",
    "check_metric",
    "check_task",
    "read_sample",
    "sample_maker",
    "sample_name",
    "score",
]
