"""A record of times to first token as Markdown."""

from experiments.latency.table import short
from experiments.ttft.parts import PARTS
from experiments.ttft.rows import Figures, Point, Rows

# What dense attention is compared with, the first of these that was measured.
BASES = ("cudnn", "dense")
NOTES = (
    "`at peak`: what the operations of the prompt, read densely, would take at the device's peak. "
    "`executed`: query-key pairs that the kernel computes, of dense attention's. `linear`: rate of "
    "projections, MLP and norms, and its share of the rate of plain matrix products of the same "
    "shapes. Parts are timed apart, `other` is what they leave. `peak`: GiB by the device's "
    "account, which is never reset, so it is missing where an earlier row held more; beside it the "
    "estimate made before. A star: some layers were run and the rest extrapolated; the "
    "estimate is of these layers. Compilation is apart."
)


def base_of(rows: Rows, point: Point) -> Figures | None:
    """Dense attention under the same conditions, None if it was not measured."""
    same = ("model", "rope_scaling", "text", "length", "dtype", "random_weights")
    for method in BASES:
        for other, figures in rows.figures.items():
            alike = all(getattr(other, name) == getattr(point, name) for name in same)
            if alike and other.method == method:
                return figures
    return None


def speed_up(rows: Rows, point: Point) -> float | None:
    """How much faster than dense attention, None for that itself or where it is not known."""
    base = base_of(rows, point)
    if base is None or base is rows.figures[point]:
        return None
    return base["seconds"] / rows.figures[point]["seconds"]


def ordered(rows: Rows) -> list[tuple[Point, Figures]]:
    """The rows by model and length, dense ones first."""
    rank = lambda method: BASES.index(method) if method in BASES else len(BASES)
    key = lambda item: (item[0].model, item[0].length, rank(item[0].method))
    return sorted(rows.figures.items(), key=key)


def markdown(rows: Rows) -> str:
    """Every row of a record, with the conditions of each model above its table."""
    blocks = []
    for model in dict.fromkeys(point.model for point, _ in ordered(rows)):
        of_model = [item for item in ordered(rows) if item[0].model == model]
        blocks += [f"**{model}**, {_conditions(rows, of_model)}", _table(rows, of_model)]
    return "\n\n".join([*blocks, NOTES])


def line(point: Point, figures: Figures) -> str:
    """A row while it is measured."""
    text = f"{point.length:>9,} {point.method:<24} {figures['seconds']:>9.3f} s"
    text += " (extrapolated)" if point.extrapolated else ""
    if "executed_share" in figures:
        text += f", executed {figures['executed_share']:.1%}"
    if "parts" in figures:
        text += ": " + ", ".join(f"{name} {s:.3g}" for name, s in figures["parts"].items())
    return f"{text}; cache {figures['kv_cache']}"


def _conditions(rows: Rows, of_model: list[tuple[Point, Figures]]) -> str:
    points = [point for point, _ in of_model]
    words = [rows.environment["device"], "/".join(sorted({p.dtype for p in points}))]
    if points[0].random_weights:
        words.append("random weights and tokens")
        if sources := {point.densities for point in points if point.densities}:
            models = {source.partition(",")[0] for source in sources}
            words.append(
                "adaptive methods estimate at full cost and visit as many blocks as the heads of "
                f"{' and '.join(sorted(models))} did at the same length"
            )
    else:
        texts = sorted({point.text for point in points})
        words.append(f"text: {'; '.join(texts)}")
        [distinct, *_] = [row["distinct_tokens"] for _, row in of_model]
        if max(point.length for point in points) > distinct:
            words.append(f"repeated beyond {distinct:,} tokens")
        words += sorted({f"RoPE {p.rope_scaling}" for p in points if p.rope_scaling})
    return ", ".join(words)


def _table(rows: Rows, of_model: list[tuple[Point, Figures]]) -> str:
    heads = (
        "tokens", "method", "seconds", "speed-up", "at peak", "executed", *PARTS,
        "linear TFLOP/s (of plain)", "cache", "peak GiB (estimate)", "compile",
    )  # fmt: skip
    lines = [_cells(*heads), _cells(*["---"] * len(heads))]
    for point, row in of_model:
        ratio = speed_up(rows, point)
        parts = row.get("parts", {})
        # Beside the layers that were run the device held the weights of all.
        known = row["peak_bytes"] is not None and not point.extrapolated
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if known else ""
        linear = ""
        if "linear_flops_per_s" in row:
            rate, share = row["linear_flops_per_s"] / 1e12, row["linear_of_plain"]
            linear = f"{rate:.3g} ({share:.0%})"
        lines.append(
            _cells(
                short(point.length),
                point.method,
                f"{row['seconds']:.3g}" + ("*" if point.extrapolated else ""),
                "" if ratio is None else f"{ratio:.3g}x",
                _optional(row.get("dense_seconds_at_peak")),
                f"{row['executed_share']:.1%}" if "executed_share" in row else "",
                *(_optional(parts.get(name)) for name in PARTS),
                linear,
                row["kv_cache"],
                f"{peak} ({row['estimate_bytes'] / 2**30:.1f})",
                f"{row['compile_seconds']:.0f} s",
            )
        )
    return "\n".join(lines)


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
