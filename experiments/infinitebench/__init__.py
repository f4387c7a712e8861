"""InfiniteBench (Zhang et al. 2024): prompts, samples and metrics of its 12 tasks."""

from experiments.infinitebench.build import build_samples
from experiments.infinitebench.metrics import check_metric, score
from experiments.infinitebench.read import check_file, read_samples
from experiments.infinitebench.tasks import SYNTHETIC, TASKS, Task, check_task

__all__ = [
    "SYNTHETIC",
    "TASKS",
    "Task",
    "build_samples",
    "check_file",
    "check_metric",
    "check_task",
    "read_samples",
    "score",
]
