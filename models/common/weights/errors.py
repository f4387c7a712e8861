"""What a checkpoint can be wrong about, said once and completely."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence


class LoadError(ValueError):
    """A model source that cannot be loaded; the message says what was expected and what to do."""


def summarise_names(names: Iterable[str]) -> list[str]:
    """Merges tensor names that differ only in their layer, so that every name stays visible.

    Example:
        `["h.0.w", "h.1.w", "h.3.w", "norm"]` becomes `["h.*.w (layers 0-1, 3)", "norm"]`.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        if match is None:
            layers[name] = []
        else:
            layers[f"{name[: match.start()]}*{name[match.end() :]}"].append(int(match.group()))
    return [
        f"{name} (layers {_ranges(sorted(numbers))})" if numbers else name
        for name, numbers in layers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
