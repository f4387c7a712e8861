"""Figures that the paper prints (arXiv 2407.02490), to stand beside ours."""

import dataclasses
from typing import Literal

from experiments.report.markdown import table

FULL = "full attention"


@dataclasses.dataclass(frozen=True)
class Printed:
    """A table of the paper, or what can be read off a figure.

    Attributes:
        name: its number.
        what: its subject.
        model: the paper's.
        columns: headings.
        rows: a figure for each column, by method; the paper's names.
        digits: behind the point.
        beside_full: how a figure is compared with full attention's: its difference in the same
            unit or in percent, or how many times it goes into that one.
        effective: length of each row, if the table has them.
    """

    name: str
    what: str
    model: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    digits: int = 1
    beside_full: Literal["points", "percent", "times"] = "points"
    effective: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Each figure, and in brackets how it stands beside full attention's."""
        full = self.rows[FULL]
        rows = [
            [method, *map(self._plain if method == FULL else self._compared, values, full)]
            for method, values in self.rows.items()
        ]
        if self.effective:
            rows = [[*row, length] for row, length in zip(rows, self.effective, strict=True)]
        return table(["method", *self.columns, *(["effective"] if self.effective else [])], rows)

    def difference(self, method: str, column: str) -> float | None:
        """A figure less full attention's, None if there is no such figure."""
        if method not in self.rows or column not in self.columns:
            return None
        place = self.columns.index(column)
        return self.rows[method][place] - self.rows[FULL][place]

    def _plain(self, value: float, full: float) -> str:
        del full
        return f"{value:.{self.digits}f}"

    def _compared(self, value: float, full: float) -> str:
        text = self._plain(value, full)
        if self.beside_full == "points":
            return f"{text} ({value - full:+.{self.digits}f})"
        if self.beside_full == "percent":
            return f"{text} ({100 * (value / full - 1):+.1f} %)"
        return f"{text} ({full / value:.2g} x)"


_INFINITEBENCH = (
    "En.Sum", "En.QA", "En.MC", "En.Dia", "Zh.QA", "Code.Debug", "Math.Find", "PassKey", "Num",
    "KV", "average",
)  # fmt: skip
_LLAMA_FULL = (20.2, 12.4, 67.3, 6.0, 12.9, 22.1, 26.6, 100.0, 100.0, 14.4, 38.2)
_LLAMA_OURS = (20.5, 12.9, 65.9, 7.5, 12.5, 22.3, 33.1, 100.0, 100.0, 12.8, 38.8)

INFINITEBENCH = (
    Printed("Table 2", "InfiniteBench", "LLaMA-3-8B-262K", _INFINITEBENCH, {
        FULL: _LLAMA_FULL,
        "StreamingLLM": (21.0, 8.2, 40.2, 10.0, 10.4, 25.9, 30.0, 86.8, 5.1, 0.8, 23.8),
        "StreamingLLM, dilated": (20.1, 9.4, 44.5, 15.5, 11.2, 20.5, 27.5, 5.0, 87.5, 0.5, 24.2),
        "StreamingLLM, strided": (17.3, 8.2, 27.5, 14.5, 11.2, 19.5, 27.5, 4.0, 2.1, 1.0, 13.3),
        "InfLLM": (24.1, 7.8, 45.0, 6.0, 11.4, 19.5, 32.9, 100.0, 100.0, 1.2, 34.8),
        "MInference, static": (19.9, 8.6, 43.2, 3.5, 8.9, 20.6, 25.1, 92.4, 96.3, 0.2, 31.9),
        "MInference": _LLAMA_OURS,
    }),
    Printed("Table 2", "InfiniteBench", "Yi-9B-200K", _INFINITEBENCH, {
        FULL: (8.2, 10.6, 64.2, 1.0, 17.3, 21.3, 23.4, 99.8, 100.0, 28.8, 37.5),
        "StreamingLLM": (5.4, 14.2, 38.0, 4.0, 18.8, 18.8, 22.3, 39.2, 6.1, 1.6, 16.8),
        "StreamingLLM, dilated": (5.7, 4.2, 15.0, 0.0, 18.2, 0.0, 2.9, 0.0, 0.0, 0.0, 4.2),
        "StreamingLLM, strided": (6.1, 4.5, 9.8, 0.0, 16.9, 0.0, 3.1, 1.5, 0.0, 0.0, 4.6),
        "InfLLM": (6.3, 13.0, 45.9, 2.5, 21.5, 20.6, 34.6, 85.3, 88.1, 1.4, 31.9),
        "MInference, static": (5.8, 12.6, 48.5, 3.0, 12.6, 20.8, 25.1, 60.9, 38.5, 1.0, 22.9),
        "MInference": (7.9, 11.2, 64.2, 1.0, 17.9, 24.1, 23.1, 99.5, 100.0, 27.6, 37.7),
    }),
    Printed("Table 2", "InfiniteBench", "GLM-4-9B-1M", _INFINITEBENCH, {
        FULL: (28.3, 9.7, 68.6, 39.5, 12.1, 29.4, 38.9, 100.0, 100.0, 41.0, 46.7),
        "StreamingLLM": (27.7, 6.4, 40.2, 12.5, 10.8, 27.7, 21.1, 97.1, 25.6, 0.6, 27.0),
        "InfLLM": (28.0, 7.3, 45.0, 14.0, 10.7, 27.9, 39.4, 98.0, 100.0, 2.6, 37.3),
        "MInference": (28.8, 9.6, 68.6, 38.5, 12.0, 30.7, 39.1, 100.0, 100.0, 43.0, 47.0),
    }),
    Printed("Table 4", "one pattern alone, InfiniteBench", "LLaMA-3-8B-262K", _INFINITEBENCH, {
        FULL: _LLAMA_FULL,
        "MInference": _LLAMA_OURS,
        "only block-sparse": (12.4, 3.4, 5.7, 6.0, 3.1, 12.2, 24.0, 59.5, 60.3, 0.0, 18.7),
        "only vertical-slash": (19.6, 12.0, 62.1, 9.5, 11.7, 21.6, 29.1, 100.0, 100.0, 5.0, 37.1),
    }),
)  # fmt: skip

SNAPKV = Printed("Table 5", "SnapKV's cache while decoding, InfiniteBench",
    "LLaMA-3-8B-262K",
    _INFINITEBENCH, {
        FULL: _LLAMA_FULL,
        "full, SnapKV": (18.0, 11.8, 65.5, 2.5, 12.0, 21.3, 26.6, 100.0, 100.0, 1.8, 36.0),
        "MInference": _LLAMA_OURS,
        "MInference, SnapKV": (18.9, 11.7, 66.4, 6.5, 12.1, 21.8, 33.1, 100.0, 100.0, 2.0, 37.3),
    },
)  # fmt: skip

_RULER = ("4K", "8K", "16K", "32K", "64K", "128K", "average")
RULER = (
    Printed("Table 3", "RULER", "LLaMA-3-8B-262K", _RULER, {
        FULL: (97.2, 91.8, 87.3, 80.8, 77.4, 72.2, 84.4),
        "StreamingLLM": (97.2, 38.1, 37.5, 17.2, 14.2, 9.4, 35.0),
        "StreamingLLM, dilated": (23.4, 0.7, 1.4, 18.8, 16.5, 15.6, 12.7),
        "StreamingLLM, strided": (2.0, 0.7, 0.6, 0.6, 0.7, 1.3, 1.0),
        "InfLLM": (89.4, 79.8, 70.1, 55.6, 43.0, 39.5, 62.9),
        "MInference": (97.7, 91.2, 88.5, 85.0, 82.3, 77.6, 87.0),
    }, effective=("16K", "4K", "<4K", "<4K", "4K", "32K")),
    Printed("Table 3", "RULER", "Yi-9B-200K", _RULER, {
        FULL: (91.9, 90.2, 78.8, 76.3, 68.1, 62.9, 78.1),
        "StreamingLLM": (91.9, 37.8, 33.9, 18.6, 13.0, 12.8, 34.3),
        "StreamingLLM, dilated": (44.8, 42.8, 38.5, 29.8, 26.8, 23.9, 34.4),
        "StreamingLLM, strided": (2.6, 0.7, 0.6, 0.6, 1.2, 0.5, 1.1),
        "InfLLM": (80.3, 83.9, 60.7, 45.2, 38.6, 30.2, 56.5),
        "MInference": (92.3, 89.7, 79.0, 73.8, 64.7, 56.9, 74.7),
    }, effective=("8K", "4K", "<4K", "<4K", "<4K", "8K")),
    Printed("Table 3", "RULER", "GLM-4-9B-1M", _RULER, {
        FULL: (93.8, 91.6, 89.3, 87.4, 85.2, 80.8, 88.0),
        "StreamingLLM": (93.8, 66.9, 58.5, 51.4, 45.9, 39.1, 59.3),
        "InfLLM": (94.7, 89.5, 76.4, 66.5, 56.8, 53.5, 72.9),
        "MInference": (94.6, 93.1, 91.0, 89.6, 85.5, 84.0, 89.6),
    }, effective=("64K", "4K", "8K", "64K")),
)  # fmt: skip

PERPLEXITY = Printed(
    "Figure 5", "perplexity of PG-19, read by eye off the picture (± 0.02)",
    "LLaMA-3-8B-262K",
    ("21.8K", "53K", "74K", "100K"), {
        FULL: (9.34, 9.19, 9.16, 9.08),
        "StreamingLLM": (10.29, 10.30, 10.33, 10.25),
        "StreamingLLM, dilated": (9.44, 9.39, 9.39, 9.31),
        "StreamingLLM, strided": (9.49, 9.44, 9.43, 9.36),
        "InfLLM": (9.90, 9.94, 10.02, 9.93),
        "MInference, static": (10.03, 10.06, 10.07, 10.00),
        "MInference": (9.38, 9.24, 9.23, 9.17),
    }, digits=2, beside_full="percent",
)  # fmt: skip

PREFILL = Printed(
    "Figure 1b", "seconds to read a prompt on one A100, from the released code's README",
    "LLaMA-3-8B-1M",
    ("1K", "10K", "50K", "100K", "200K", "300K", "500K", "1000K"), {
        FULL: (0.55, 0.98, 8.53, 24.88, 79.39, 169.62, 456.78, 1765.56),
        "A-shape": (1.07, 1.18, 5.48, 10.86, 21.61, 32.45, 54.16, 107.86),
        "InfLLM": (2.94, 2.21, 14.64, 27.67, 55.65, 80.74, 167.91, 328.59),
        "MInference": (2.96, 2.78, 7.55, 13.99, 26.81, 41.09, 66.28, 179.12),
        "MInference, later kernels": (1.25, 2.44, 6.20, 10.82, 20.62, 31.02, 51.96, 112.38),
    }, digits=2, beside_full="times",
)  # fmt: skip

NEEDLE = (
    "The paper (Figures 1a, 6 and 8, LLaMA-3-8B-1M, 1K to 1M tokens, 10 depths, 750 samples): "
    "MInference finds all but one cell of 150; StreamingLLM and InfLLM fail outside of sink and "
    "window."
)
COMPARABLE = (
    "Of the paper's figures, a method's difference from full attention (in brackets) can be "
    "compared with ours, and from which length on it grows. Scores themselves, averages and times "
    "cannot: models, lengths, samples, tokenizers and devices are others, and ours are fewer tasks "
    "and samples. Our `dense` is its full attention, `a_shape` its StreamingLLM, "
    "`streaming_dilated` and `streaming_strided` the variants of that, `inf_llm` its InfLLM. Its "
    "MInference has searched patterns, as our `patterns:…` have; our `minference` chooses blocks "
    "and columns for each prompt, by thresholds that are searched only where such are shipped. "
    "Averages as printed: some are not the means of their rows."
)
