"""Pictures of a latency record."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from experiments.common.plotting import new_figure, save
from experiments.latency.rows import Figures, Point, Rows
from experiments.latency.table import kernel_alone, short

_COLUMNS = 3
_PEERS = {"cudnn": "dense, cuDNN", "xla": "dense, XLA", "torch-fa2": "dense, torch FA2"}
# Curves of a panel; the layer's is the one that carries the speed-up.
_LAYER = "layer, index included"
_PARTS = ("estimation", "selection, tiles", "plan", "gather", "attention")


def times_picture(rows: Rows, path: Path) -> Path:
    """Writes time against length for every pattern, dense attention by others beside it.

    The numbers are the speed-up over JAX's own dense attention (cuDNN on a GPU), of the layer where
    there is one.
    """
    panels: dict[str, dict[str, list[tuple[Point, Figures]]]] = {}
    for point, row in sorted(rows.figures.items(), key=lambda item: item[0].length):
        if point.level != "peer":
            panel, curve = _place(point)
            panels.setdefault(panel, {}).setdefault(curve, []).append((point, row))
    peers: dict[str, list[tuple[int, float]]] = {}
    for point, row in sorted(rows.figures.items(), key=lambda item: item[0].length):
        if point.level == "peer":
            peers.setdefault(point.name, []).append((point.length, row["ms"]))
    columns = min(_COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = new_figure(3.9 * columns + 0.6, 3.2 * height + 0.4, columns, height)
    for each, (title, curves) in zip(axes, panels.items(), strict=False):
        _draw_panel(each, title, curves, peers)
    for unused in axes[len(panels) :]:
        unused.remove()
    figure.suptitle(_setting(rows), fontsize=9)
    return save(figure, path)


def split_picture(rows: Rows, path: Path) -> Path | None:
    """Writes how the time of each split layer divides, None if no layer was split."""
    split = [(p, r) for p, r in rows.figures.items() if p.level == "layer" and "kernel_ms" in r]
    if not split:
        return None
    split.sort(key=lambda item: (item[0].name, item[0].length))
    figure, [axes] = new_figure(max(4.8, 1.6 + 0.9 * len(split)), 4.0)
    below = [0.0] * len(split)
    for number, part in enumerate(_PARTS):
        shares = [_parts(row)[number] / sum(_parts(row)) for _, row in split]
        axes.bar(range(len(split)), shares, 0.7, below, color=f"C{number}", label=part)
        for at, share in enumerate(shares):
            if share >= 0.03:
                text = _brief(_parts(split[at][1])[number])
                axes.text(at, below[at] + share / 2, text, ha="center", va="center", fontsize=7)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    for at, (_, row) in enumerate(split):
        axes.text(at, 1.01, _brief(row["ms"]), ha="center", va="bottom", fontsize=8)
    names = {point.name for point, _ in split}
    label = lambda p: short(p.length) + ("" if len(names) == 1 else f"\n{_title(p.name)}")
    axes.set_xticks(range(len(split)), [label(point) for point, _ in split])
    axes.set(ylabel="share of the parts' time", ylim=(0, 1.08), xlabel="tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_title(
        f"milliseconds of {_title(split[0][0].name) if len(names) == 1 else 'each layer'}: "
        f"parts timed apart,\nabove the bars the whole layer",
        fontsize=9,
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return save(figure, path)


def _parts(row: Figures) -> list[float]:
    """Milliseconds in the order of `_PARTS`; differences of noisy times are at least 0."""
    estimation = row.get("estimation_ms", 0.0)
    selection = row["index_ms"] - estimation
    parts = [estimation, selection, row["plan_ms"], row["gather_ms"], kernel_alone(row)]
    return [max(part, 0.0) for part in parts]


def _place(point: Point) -> tuple[str, str]:
    """The panel and the curve of a point."""
    words = point.name.split("-")
    panel, rest = point.name, ""
    if words[0] == "lines":
        panel, rest = "-".join(words[:3]), " ".join(words[3:])
    if point.level == "layer":
        return panel, _LAYER
    return panel, f"{rest}, lists given" if rest else "lists given"


def _title(name: str) -> str:
    kind, *sizes = name.split("-")
    known = {"lines": "lines", "a_shape": "A-shape", "blocks": "block-sparse, blocks"}
    if kind in known and sizes:
        return f"{known[kind]} ({', '.join(sizes)})"
    return textwrap.fill("dense through our kernel" if name == "dense" else name, 48)


def _brief(value: float) -> str:
    """Two or three digits, without an exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _draw_panel(
    axes: Axes,
    title: str,
    curves: dict[str, list[tuple[Point, Figures]]],
    peers: dict[str, list[tuple[int, float]]],
) -> None:
    lengths: set[int] = set()
    for name, points in peers.items():
        x, y = zip(*points, strict=True)
        style = "s-" if name in ("cudnn", "xla") else "s:"
        axes.plot(x, y, style, c="0.6", ms=3, lw=1, label=_PEERS.get(name, f"dense, {name}"))
        lengths |= set(x)
    numbered = _LAYER if _LAYER in curves else next(iter(curves))
    for number, (name, points) in enumerate(curves.items()):
        x = [point.length for point, _ in points]
        y = [row["ms"] for _, row in points]
        if name == _LAYER:
            axes.plot(x, y, "o-", c="black", ms=4, label=name)
        else:
            axes.plot(x, y, "o--", c=f"C{number}", ms=3, lw=1, label=name)
        lengths |= set(x)
        if name == numbered:
            for point, row in points:
                if "speedup" in row:
                    axes.annotate(
                        f"{_brief(row['speedup'])} x", (point.length, row["ms"]), (4, -9),
                        textcoords="offset points", fontsize=7,
                    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    axes.set_title(_title(title), fontsize=9)
    ticks = sorted(lengths)
    axes.set_xticks(ticks, [short(length) for length in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.08)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=6.5)


def _setting(rows: Rows) -> str:
    point = next(iter(rows.figures))
    newest = rows.environments[-1]
    return (
        f"{newest['device']}, one layer of {point.layer}: {point.heads} query and "
        f"{point.kv_heads} key/value heads, head_dim {point.head_dim}, {point.dtype}; numbers: "
        "speed-up over dense"
    )
