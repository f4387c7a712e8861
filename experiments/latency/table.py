"""The project's aims for speed beside what a record says, as Markdown."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from experiments.latency.rows import Figures, Point, Rows

_LONG = 32768
_128K, _1M = 131072, 1048576


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured value, and what it was measured on."""

    value: float | int
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """One line of the table: of several measurements the worst is judged.

    Attributes:
        what: what is measured.
        floor: least that is asked for.
        aim: what is hoped for.
        unit: of the values.
        larger_is_better: whether values above the floor meet it.
        measure: all measured values of the line.
    """

    what: str
    floor: float | int
    aim: float | int
    unit: str
    larger_is_better: bool
    measure: Callable[[Rows, list[dict[str, Any]]], Iterator[Measured]]

    def row(self, rows: Rows, visited: list[dict[str, Any]]) -> str:
        """The line in Markdown."""
        found = list(self.measure(rows, visited))
        sign = -1 if self.larger_is_better else 1
        found.sort(key=lambda m: -sign * m.value)
        cells = [self.what, _number(self.floor, self.unit), _number(self.aim, self.unit)]
        if not found:
            return _cells(*cells, "not measured", "")
        worst, best = found[0], found[-1]
        text = f"{_number(worst.value, self.unit)} ({worst.where})"
        if len(found) > 1:
            text += f"; best {_number(best.value, self.unit)} ({best.where})"
        meets = lambda bound: sign * worst.value <= sign * bound
        verdict = "aim met" if meets(self.aim) else "floor met" if meets(self.floor) else "missed"
        return _cells(*cells, text, verdict)


def aims_markdown(rows: Rows, visited: list[dict[str, Any]]) -> str:
    """The table of aims.

    Args:
        rows: a latency record.
        visited: results of `minference visited`.
    """
    lines = [_cells("what", "floor", "aim", "measured", ""), _cells(*["---"] * 5)]
    return "\n".join(lines + [aim.row(rows, visited) for aim in _aims()])


def rows_markdown(rows: Rows) -> str:
    """Every row of a record; a star marks a speed-up over a peer that was timed in another run."""
    heads = (
        "tokens", "what", "name", "ms", "keys visited", "keys executed for a row",
        "TFLOP/s", "of dense rate", "speed-up over dense", "estimation", "index", "plan", "gather",
    )  # fmt: skip
    lines = [_cells(*heads), _cells(*["---"] * len(heads))]
    level = ["peer", "kernel", "layer"].index
    for point, row in sorted(
        rows.figures.items(), key=lambda item: (item[0].length, level(item[0].level))
    ):
        part = lambda name, row=row: f"{row[name]:.2f}" if name in row else ""
        lines.append(
            _cells(
                f"{point.length:,}",
                point.level,
                point.name,
                f"{row['ms']:.2f}",
                f"{row['density']:.2%}" if "density" in row else "",
                f"{row['keys_per_row']:,.0f}" if "keys_per_row" in row else "",
                f"{row['tflops']:.0f}",
                part("rate_ratio"),
                part("speedup") + ("" if row.get("dense_in_same_run", True) else "*"),
                *(part(f"{name}_ms") for name in ("estimation", "index", "plan", "gather")),
            )
        )
    return "\n".join(lines)


def short(length: int) -> str:
    """A number of tokens as people write it: 8K, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"


def kernel_alone(row: Figures) -> float:
    """Milliseconds of a split layer's attention kernel, without plan and gather."""
    return row["kernel_ms"] - row["plan_ms"] - row["gather_ms"]


def _aims() -> list[Aim]:
    return [
        Aim(
            what="rate over tiles visited, of cuDNN dense at the same length, 32K and longer",
            floor=0.90, aim=1.05, unit="x", larger_is_better=True, measure=_rates,
        ),
        Aim(
            what="dense through the same kernel, of cuDNN's rate",
            floor=0.95, aim=1.05, unit="x", larger_is_better=True, measure=_dense,
        ),
        Aim(
            what="vertical-slash layer over its attention kernel alone, 128K and longer",
            floor=1.10, aim=1.03, unit="x", larger_is_better=False, measure=_overhead,
        ),
        *(
            Aim(
                what=f"{what}, {short(length)}", floor=floor, aim=aim, unit=" ms",
                larger_is_better=False, measure=_time(level, name, length),
            )
            for what, level, name, length, floor, aim in (
                ("lines (1000, 6096), clustered", "kernel", "lines-1000-6096-clustered", _128K,
                 100, 70),
                ("lines (1000, 6096), clustered", "kernel", "lines-1000-6096-clustered", _1M,
                 650, 450),
                ("A-shape (128, 1024)", "kernel", "a_shape-128-1024", _128K, 8, 5),
                ("block-sparse top-100, index included", "layer", "blocks-100", _128K, 35, 25),
            )
        ),
        Aim(
            what="keys visited for lines of real heads, over the original's execution of them",
            floor=1.35, aim=1.05, unit="x", larger_is_better=False, measure=_visited,
        ),
        Aim(
            what="any pattern's layer over cuDNN dense",
            floor=1.05, aim=1.00, unit="x", larger_is_better=False,
            measure=lambda rows, visited: _over_dense(rows, ("peer", "cudnn")),
        ),
        Aim(
            what="any pattern's layer over dense through the same kernel",
            floor=1.05, aim=1.00, unit="x", larger_is_better=False,
            measure=lambda rows, visited: _over_dense(rows, ("kernel", "dense")),
        ),
        Aim(
            what="index memory of a vertical-slash head at 1M",
            floor=1000, aim=100, unit=" KB", larger_is_better=False, measure=_index_memory,
        ),
    ]  # fmt: skip


def _of(rows: Rows, level: str) -> Iterator[tuple[Point, Figures]]:
    return ((point, row) for point, row in rows.figures.items() if point.level == level)


def _where(point: Point) -> str:
    return f"{point.name}, {short(point.length)}"


def _rates(rows, visited):
    for point, row in _of(rows, "kernel"):
        if point.length >= _LONG and "rate_ratio" in row and point.name != "dense":
            yield Measured(value=row["rate_ratio"], where=_where(point))


def _dense(rows, visited):
    for point, row in _of(rows, "kernel"):
        if point.name == "dense" and "rate_ratio" in row:
            yield Measured(value=row["rate_ratio"], where=short(point.length))


def _overhead(rows, visited):
    for point, row in _of(rows, "layer"):
        if point.length >= _128K and point.name.startswith("lines") and "kernel_ms" in row:
            yield Measured(value=row["ms"] / kernel_alone(row), where=_where(point))


def _time(level, name, length):
    def measure(rows, visited):
        for point, row in _of(rows, level):
            if (point.name, point.length) == (name, length):
                yield Measured(value=row["ms"], where=point.layer)

    return measure


def _visited(rows, visited):
    for result in visited:
        for budget, row in result["budgets"].items():
            ours = row["ours"].get("96")
            if ours is not None and row["original"]["visited"] < 0.9:
                where = f"({budget.replace('-', ', ')}), {short(result['length'])}, block_kv 96"
                yield Measured(value=ours["visited_ratio"], where=where)


def _over_dense(rows, peer):
    dense = {
        point.length: row["ms"]
        for point, row in rows.figures.items()
        if (point.level, point.name) == peer
    }
    for point, row in _of(rows, "layer"):
        if point.length in dense:
            yield Measured(value=row["ms"] / dense[point.length], where=_where(point))


def _index_memory(rows, visited):
    for point, row in _of(rows, "layer"):
        if point.length == _1M and point.name.startswith("lines"):
            yield Measured(value=row["index_bytes_per_head"] / 1000, where=point.name)


def _number(value: float | int, unit: str) -> str:
    digits = 2 if unit == "x" else 0 if value >= 100 else 1
    return f"{value:.{digits}f}{unit}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
