"""The picture of a latency run."""

from pathlib import Path

import numpy as np

from experiments.common.plotting import new_figure, save
from experiments.latency.layer import LayerTimes


def latency_picture(results: list[LayerTimes], *, title: str, path: Path) -> Path:
    """Writes time against length, both logarithmic, for every part and every peer."""
    figure, [axes] = new_figure(6.4, 4.4)
    lengths = [times.length for times in results]
    parts = (("sparse", "o-", "C0"), ("attention", "o--", "C0"), ("index", "o:", "C0"))
    for name, style, colour in parts:
        axes.plot(lengths, [1e3 * getattr(t, name) for t in results], style, c=colour, label=name)
    axes.plot(lengths, [1e3 * t.dense for t in results], "s-", c="C1", label="dense, our kernel")
    for number, name in enumerate(results[0].peers):
        ran = [(t.length, t.peers[name]["seconds"]) for t in results if "seconds" in t.peers[name]]
        if ran:
            axes.plot(
                [length for length, _ in ran],
                [1e3 * np.median(seconds) for _, seconds in ran],
                "^-",
                c=f"C{2 + number}",
                label=f"dense, {name}",
            )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=title)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    return save(figure, path)
