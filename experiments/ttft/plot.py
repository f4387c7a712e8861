"""Pictures of a record of times to first token."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes

from experiments.common.plotting import line_style, log_seconds, new_figure, save
from experiments.latency.table import short
from experiments.ttft.parts import PARTS
from experiments.ttft.rows import Figures, Point, Rows
from experiments.ttft.table import ordered, speed_up


def seconds_picture(rows: Rows, path: Path) -> Path:
    """Writes seconds against length, a panel for each model, the speed-up over dense at points.

    Hollow points are extrapolated from some layers.
    """
    models = list(dict.fromkeys(point.model for point, _ in ordered(rows)))
    figure, axes = new_figure(5.4 * len(models) + 0.4, 4.4, len(models))
    for each, model in zip(axes, models, strict=True):
        _draw(each, rows, [item for item in ordered(rows) if item[0].model == model])
    figure.suptitle(rows.environment["device"], fontsize=9)
    return save(figure, path)


def parts_picture(rows: Rows, path: Path) -> Path | None:
    """Writes how the time of each row divides, None if no row was split."""
    found = [item for item in ordered(rows) if "parts" in item[1]]
    if not found:
        return None
    figure, [axes] = new_figure(max(5.5, 1.8 + 0.55 * len(found)), 4.6)
    below = [0.0] * len(found)
    for number, part in enumerate(PARTS):
        # Noise can leave less than nothing over: the table says so, a bar cannot.
        shares = [max(row["parts"].get(part, 0.0), 0.0) / row["seconds"] for _, row in found]
        axes.bar(range(len(found)), shares, 0.75, below, color=f"C{number}", label=part)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    for at, (point, row) in enumerate(found):
        star = "*" if point.extrapolated else ""
        axes.text(at, below[at] + 0.01, f"{row['seconds']:.3g}{star}", ha="center", fontsize=7)
    many = len({point.model for point, _ in found}) > 1
    labels = [
        f"{short(point.length)} {point.method}" + (f"\n{point.model}" if many else "")
        for point, _ in found
    ]
    axes.set_xticks(range(len(found)), labels, rotation=90, fontsize=7)
    axes.set(ylabel="share of the time to first token", ylim=(0, max(1.1, 1.08 * max(below))))
    models = " and ".join(dict.fromkeys(point.model for point, _ in found))
    title = f"{models}, {rows.environment['device']}: parts timed apart, above the bars seconds"
    stars = "; *: extrapolated" if any(point.extrapolated for point, _ in found) else ""
    axes.set_title(textwrap.fill(title + stars, 70), fontsize=9)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return save(figure, path)


def _draw(axes: Axes, rows: Rows, items: list[tuple[Point, Figures]]) -> None:
    name = lambda point: point.method + (f", {point.mesh}" if point.mesh else "")
    for number, label in enumerate(dict.fromkeys(name(point) for point, _ in items)):
        points = [item for item in items if name(item[0]) == label]
        x = [point.length for point, _ in points]
        style = line_style(number)
        axes.plot(x, [row["seconds"] for _, row in points], label=label, lw=1.2, **style)
        for point, row in points:
            if point.extrapolated:
                axes.plot(
                    [point.length], [row["seconds"]], linestyle="", color=style["color"],
                    marker=style["marker"], markersize=4, markerfacecolor="white",
                )  # fmt: skip
            if (ratio := speed_up(rows, point)) is not None:
                axes.annotate(
                    f"{ratio:.2g}x", (point.length, row["seconds"]), (3, -10), fontsize=7,
                    textcoords="offset points", color=style["color"],
                )  # fmt: skip
    one = [(p.length, row.get("dense_seconds_at_peak")) for p, row in items if not p.mesh]
    peak = sorted(set(one))
    if peak and all(seconds is not None for _, seconds in peak):
        axes.plot(*zip(*peak, strict=True), ":", c="0.6", lw=1, label="dense at the device's peak")
    lengths = sorted({point.length for point, _ in items})
    axes.set(xscale="log", xlabel="tokens", ylabel="seconds to first token")
    log_seconds(axes)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    axes.grid(visible=True, alpha=0.3)
    first = items[0][0]
    weights = "random weights" if first.random_weights else "real weights"
    notes = [weights]
    if any(point.densities for point, _ in items):
        notes.append("visited blocks prescribed")
    if any(point.extrapolated for point, _ in items):
        notes.append("hollow: extrapolated")
    axes.set_title(textwrap.fill(f"{first.model}: {', '.join(notes)}", 60), fontsize=9)
    axes.legend(frameon=False, fontsize=7)
