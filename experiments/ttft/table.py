"""A record of times to first token as Markdown."""

import dataclasses

from experiments.latency.table import short
from experiments.ttft.digest import agreement
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
MESH_NOTES = (
    "`mesh`: devices that share the work, tp its heads, cp the prompt; speed-up is over dense "
    "attention on the same mesh, `at peak` of all its devices, `peak` of the device with most. "
    "Parts are of one device only. `efficiency`: seconds of the same row on one device, over "
    "devices times seconds. `as one device`: whether the likeliest token is that of one device, "
    "and the largest difference of a logit among the likeliest tokens that both name, over the "
    "standard deviation of all logits."
)


def base_of(rows: Rows, point: Point) -> Figures | None:
    """Dense attention under the same conditions, None if it was not measured."""
    same = ("model", "rope_scaling", "text", "length", "dtype", "random_weights", "mesh")
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


def on_one_device(rows: Rows, point: Point) -> Point | None:
    """The same row on one device: as many layers and the same cache if there is, or others.

    None for a row of one device, and where there is no such row.
    """
    if point.mesh is None:
        return None
    alike = {"mesh": None, "timed_layers": 0, "kv_cache": ()}
    same = lambda point: dataclasses.replace(point, **alike)
    found = [other for other in rows.figures if not other.mesh and same(other) == same(point)]
    nearness = lambda other: (
        other.timed_layers == point.timed_layers,
        other.kv_cache == point.kv_cache,
    )
    return max(found, key=nearness, default=None)


def efficiency(rows: Rows, point: Point) -> float | None:
    """Seconds on one device over devices times seconds, None where one is not known."""
    one = on_one_device(rows, point)
    if one is None:
        return None
    return rows.figures[one]["seconds"] / (point.devices * rows.figures[point]["seconds"])


def as_one_device(rows: Rows, point: Point) -> tuple[bool, float | None] | None:
    """Whether the result is that of one device, see `agreement`; None where it is not known."""
    one = on_one_device(rows, point)
    if one is None or one.timed_layers != point.timed_layers:
        return None
    first, second = (rows.figures[each].get("digest") for each in (one, point))
    return None if first is None or second is None else agreement(first, second)


def ordered(rows: Rows) -> list[tuple[Point, Figures]]:
    """The rows by model, length and devices, dense ones first."""
    rank = lambda method: BASES.index(method) if method in BASES else len(BASES)
    key = lambda item: (
        item[0].model, item[0].length, item[0].devices, item[0].mesh or "", rank(item[0].method)
    )  # fmt: skip
    return sorted(rows.figures.items(), key=key)


def markdown(rows: Rows) -> str:
    """Every row of a record, with the conditions of each model above its table."""
    blocks = []
    for model in dict.fromkeys(point.model for point, _ in ordered(rows)):
        of_model = [item for item in ordered(rows) if item[0].model == model]
        blocks += [f"**{model}**, {_conditions(rows, of_model)}", _table(rows, of_model)]
    notes = [NOTES, MESH_NOTES] if any(point.mesh for point in rows.figures) else [NOTES]
    return "\n\n".join([*blocks, " ".join(notes)])


def line(point: Point, figures: Figures) -> str:
    """A row while it is measured."""
    mesh = "" if point.mesh is None else f" {point.mesh}"
    text = f"{point.length:>9,} {point.method:<24}{mesh} {figures['seconds']:>9.3f} s"
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
    meshes = any(point.mesh for point, _ in of_model)
    heads = (
        "tokens", "method", *(("mesh", "efficiency", "as one device") * meshes), "seconds",
        "speed-up", "at peak", "executed", *PARTS, "linear TFLOP/s (of plain)", "cache",
        "peak GiB (estimate)", "compile",
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
                *(_on_mesh(rows, point) * meshes),
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


def _on_mesh(rows: Rows, point: Point) -> tuple[str, str, str]:
    """The cells of a table with several meshes."""
    share, result = efficiency(rows, point), as_one_device(rows, point)
    shared = "" if share is None else f"{share:.0%}"
    alike = ""
    if result is not None:
        same, apart = result
        alike = ("yes" if same else "no") + ("" if apart is None else f" ({apart:.2g})")
    return point.mesh or "1", shared, alike


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
