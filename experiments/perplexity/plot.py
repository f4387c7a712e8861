"""The picture of perplexity by length (the paper's Fig. 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.common.plotting import line_style, new_figure, save, short_tokens, wrapped
from experiments.perplexity.measure import Mean

_FAR = 3.0  # times the highest perplexity of dense attention


def curves_picture(curves: Mapping[str, Sequence[Mean]], *, title: str, path: Path) -> Path:
    """Writes perplexity against length, a line for each method, dense attention's dashed.

    Args:
        curves: by method, shortest lengths first.
        title: the model's name.
        path: the file.
    """
    figure, [axes] = new_figure(5.6, 3.4 + 0.17 * len(curves))
    [first, *_] = curves.values()
    lengths = [mean.length for mean in first]
    dense = [mean.dense_perplexity for mean in first]
    # In front: methods that change nothing lie on it.
    axes.plot(lengths, dense, "s--", color="0.35", label="dense", markersize=4, zorder=3)
    for number, (label, curve) in enumerate(curves.items()):
        if label != "dense":
            values = [mean.perplexity for mean in curve]
            axes.plot(lengths, values, label=label, **line_style(number))
    highest = max(mean.perplexity for curve in curves.values() for mean in curve)
    # One method far above would press the others together.
    scale = "log" if highest > _FAR * max(dense) else "linear"
    axes.set(xlabel="length (tokens)", ylabel="perplexity", yscale=scale)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [short_tokens(length) for length in lengths])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    texts = f"{first[0].texts} text{'s' if first[0].texts > 1 else ''}"
    axes.set_title(wrapped(f"{title}, {texts}", figure), fontsize=8)
    return save(figure, path)
