"""`minference patterns maps`: attention of chosen heads, what they visit over it (Fig. 3a, 7)."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from rich.console import Console

import minference_jax as mj
from experiments.common.attention import AttentionOptions
from experiments.common.errors import UserError
from experiments.common.measure import stage
from experiments.common.options import at_least
from experiments.common.plotting import new_figure, save
from experiments.patterns.maps import HeadMap, head_map
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.read import AnyArray, layers_of
from experiments.search.report import label
from models import Model

# Colours of what is visited, and how strong they are where all of a cell is.
_TILES, _COLUMNS, _TINT = to_rgb("tab:blue"), to_rgb("tab:orange"), 0.55
# Attention is drawn from this many times its even share (white) to that many times (black).
_FAINT, _STRONG = 1.0, 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps(PromptAnalysis):
    """Draw the attention of chosen heads on one or more prompts, and what their index visits."""

    heads: tuple[tuple[int, int], ...]
    """Layer and head of each head drawn."""
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    cells: int = 256
    """Squares along each side of a map."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        at_least("cells", self.cells, 1)
        if self.layers:
            raise UserError("--layers does not apply: --heads names the layers")
        if not self.heads or any(min(pair) < 0 for pair in self.heads):
            raise UserError(f"--heads must be pairs LAYER HEAD of at least 0, got {self.heads}")

    def run(self, model: Model | None = None) -> None:
        """Runs the analysis; raises UserError if an input cannot be used.

        Args:
            model: the model if it was loaded before.
        """
        progress, console = Console(stderr=True), Console()
        self.attention.check_readable()
        model, tokens = self.open(model, prompts=len(self.calibration.wanted))
        layers, heads = model.config.num_layers, model.config.num_heads
        if any(layer >= layers or head >= heads for layer, head in self.heads):
            raise UserError(
                f"--heads must be below {layers} layers and {heads} heads, got {self.heads}"
            )
        chosen = self.attention.for_model(model, progress)
        attention = chosen.build(num_layers=layers, num_heads=heads)
        length = min(map(len, tokens))
        step = -(-length // self.cells)
        wanted = sorted({layer for layer, _ in self.heads})
        build = jax.jit(lambda attention, x: attention.attend(x.q, x.k, x.v)[1])
        rows, pictures = [], []
        with stage(progress, f"reading {len(tokens)} prompts of {length:,} tokens") as reading:
            for layer, prompts in layers_of(model, tokens, wanted):
                indices = [build(attention.layer(layer), prompt) for prompt in prompts]
                shares = [np.asarray(index.density(length, length)[0]) for index in indices]
                for head in sorted({head for at, head in self.heads if at == layer}):
                    maps = [
                        jax.device_get(head_map(x.q, x.k, index, np.int32(head), step=step))
                        for x, index in zip(prompts, indices, strict=True)
                    ]
                    row = {
                        "layer": layer,
                        "head": head,
                        "pattern": self._pattern(attention, layer, head),
                        "visited": [float(share[head]) for share in shares],
                        "recall": [float(x.recall) for x in maps],
                    }
                    rows.append(row)
                    picture = _picture(maps, row["visited"], step, length, title=_title(row))
                    path = self.output / f"map_layer{layer}_head{head}.png"
                    pictures.append(save(picture, path))
        for row in rows:
            kept = ", ".join(f"{x:.1%}" for x in row["recall"])
            console.print(f"{_title(row)}: attention inside {kept}", highlight=False)
        result = self.about(tokens, wanted) | {
            "attention": chosen.describe(),
            "seconds": reading.seconds,
            "heads": rows,
        }
        self.keep(console, "maps", result, *pictures)

    def _pattern(self, attention: Any, layer: int, head: int) -> str:
        if isinstance(attention, mj.SparseAttention):
            return label(attention.patterns.pattern(layer, head))
        return self.attention.attention


def _title(row: dict[str, Any]) -> str:
    return f"layer {row['layer']}, head {row['head']}, {row['pattern']}"


def _picture(
    maps: list[HeadMap], visited: list[float], step: int, length: int, *, title: str
) -> Figure:
    figure, axes = new_figure(8.6, 4.3 * len(maps), columns=2, rows=len(maps))
    figure.suptitle(title, fontsize=10)
    for number, (one, share) in enumerate(zip(maps, visited, strict=True)):
        dark = _darkness(one.attention, step, length)
        plain, over = axes[2 * number : 2 * number + 2]
        _draw(plain, 1 - np.repeat(dark[..., None], 3, axis=2), length)
        plain.set_title(f"prompt {number}: attention")
        _draw(over, _tinted(one) * (1 - dark[..., None]), length)
        over.set_title(f"visited: {share:.1%} of pairs, {one.recall:.1%} of attention")
    handles = [
        Patch(color="0", label=f"attention ≥ {_STRONG:g} times its even share (log scale)"),
        Patch(color=_tint(_TILES), label="tiles visited"),
        Patch(color=_tint(_COLUMNS), label="columns visited"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _darkness(
    attention: Float[AnyArray, "cells cells"], step: int, length: int
) -> Float[np.ndarray, "cells cells"]:
    """0 to 1 on a log scale, from the attention over what it would be if all keys got the same."""
    rows = np.minimum(step * (np.arange(len(attention)) + 0.5), length)
    times = attention * rows[:, None] / step
    return np.clip(np.log(np.maximum(times, _FAINT) / _FAINT) / np.log(_STRONG / _FAINT), 0, 1)


def _tinted(one: HeadMap) -> Float[np.ndarray, "cells cells 3"]:
    """White, coloured as far as a cell is visited; the root lets a single line be seen."""
    colours = np.ones((*one.tiles.shape, 3))
    for share, colour in ((one.tiles, _TILES), (one.columns, _COLUMNS)):
        weight = _TINT * np.sqrt(share)[..., None]
        colours = colours * (1 - weight) + weight * np.array(colour)
    return np.clip(colours, 0, 1)


def _tint(colour: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = (1 - _TINT * (1 - x) for x in colour)
    return red, green, blue


def _draw(axes: Axes, colours: Float[np.ndarray, "cells cells 3"], length: int) -> None:
    future = np.triu(np.ones(colours.shape[:2], bool), 1)
    axes.imshow(np.where(future[..., None], 0.93, colours), extent=(0, length, length, 0))
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
