"""`minference patterns sparsity`: what fixed budgets cost at growing lengths (Fig. 12)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

import minference_jax as mj
from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.measure import stage
from experiments.common.plotting import new_figure, save
from experiments.patterns.options import PromptAnalysis
from experiments.patterns.read import layers_of, spread_rows
from experiments.patterns.recall import Tradeoff, tradeoff
from experiments.search.report import COLOURS, label
from minference_jax.patterns import Kind
from minference_jax.search import for_heads
from models import Model

# As `SparseAttention` does.
_DENSE_ABOVE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity(PromptAnalysis):
    """Share of dense attention's work that fixed budgets save, on prefixes of growing length.

    Every head has each pattern in turn; as in attention, a head whose list would cost more than 0.9
    of dense attention is dense. --length is that of the longest prefix.
    """

    lengths: tuple[int, ...] = ()
    """Lengths of the prefixes; halves of --length, down to 512, if not given."""
    a_shape: tuple[int, int] = (128, 1024)
    """First keys and nearest keys."""
    vertical_slash: tuple[int, int] = (1000, 6096)
    """Columns and diagonals."""
    block_sparse: int = 100
    """Blocks of 64 keys."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        super().__post_init__()
        longest = self.calibration.length
        if self.lengths and not 1 <= min(self.lengths) <= max(self.lengths) <= longest:
            raise UserError(f"--lengths must be 1 to --length {longest}, got {self.lengths}")
        self.patterns()

    def patterns(self) -> list[mj.Pattern]:
        """Returns the patterns; raises UserError for a budget out of range."""
        with reported_as_user_error(ValueError):
            return [
                mj.AShape(sink_size=self.a_shape[0], window_size=self.a_shape[1]),
                mj.VerticalSlash(
                    vertical_size=self.vertical_slash[0], slash_size=self.vertical_slash[1]
                ),
                mj.BlockSparse(num_blocks=self.block_sparse),
            ]

    def run(self, model: Model | None = None) -> None:
        """Runs the analysis; raises UserError if an input cannot be used.

        Args:
            model: the model if it was loaded before.
        """
        progress, console = Console(stderr=True), Console()
        model, tokens = self.open(model)
        layers, longest = self.chosen_layers(model), len(tokens[0])
        lengths = sorted({min(length, longest) for length in self.lengths or _halves(longest)})
        families = self.patterns()
        candidates = for_heads(families, model.config.num_heads)
        found: dict[int, list[Tradeoff]] = {length: [] for length in lengths}
        with stage(progress, f"reading {longest:,} tokens") as reading:
            for _, [prompt] in layers_of(model, tokens, layers):
                for length in lengths:
                    rows = jnp.asarray(spread_rows(length, self.rows))
                    shares = tradeoff(
                        candidates,
                        prompt.q,
                        prompt.k,
                        rows,
                        # What a token sees lies before it: a prefix reads as if it were all.
                        lengths=jnp.array([length]),
                        dense_above=_DENSE_ABOVE,
                    )
                    found[length].append(jax.device_get(shares))
        # [lengths, candidates, layers, heads]
        stacked = [
            Tradeoff(*(np.stack(x, axis=1) for x in zip(*found[length], strict=True)))
            for length in lengths
        ]
        curves = Tradeoff(*map(np.stack, zip(*stacked, strict=True)))
        names = [label(family) for family in families]
        console.print(_table(names, lengths, curves))
        result = self.about(tokens, layers) | {
            "seconds": reading.seconds,
            "lengths": lengths,
            "patterns": names,
            **{name: x.mean(axis=(2, 3)) for name, x in curves._asdict().items()},
            "executed_by_layer": np.round(curves.executed.mean(axis=3).astype(float), 4),
        }
        title = f"{Path(self.model.model).name}, {self.calibration.describe()}"
        picture = save(_picture(names, lengths, curves, title), self.output / "sparsity.png")
        self.keep(console, "sparsity", result, picture)


def _halves(longest: int) -> list[int]:
    number = max(1, int(np.log2(max(longest / 512, 1))) + 1)
    return [longest >> n for n in range(number)]


def _table(names: list[str], lengths: list[int], curves: Tradeoff) -> Table:
    table = Table(title="% of dense attention: tiles executed / pairs visited / attention kept")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    means = {name: 100 * x.mean(axis=(2, 3)) for name, x in curves._asdict().items()}
    for row, length in enumerate(lengths):
        cells = [
            " / ".join(f"{means[kind][row, at]:.1f}" for kind in ("executed", "visited", "recall"))
            for at in range(len(names))
        ]
        table.add_row(f"{length:,}", *cells)
    return table


def _picture(names: list[str], lengths: list[int], curves: Tradeoff, title: str) -> Figure:
    figure, axes = new_figure(9.4, 4.2, columns=2)
    figure.suptitle(title, fontsize=10)
    colours = [COLOURS[kind] for kind in (Kind.A_SHAPE, Kind.VERTICAL_SLASH, Kind.BLOCK_SPARSE)]
    sparsity = 1 - curves.executed
    for one, values, words in (
        (axes[0], sparsity, "sparsity: tiles that the kernel does not execute"),
        (axes[1], curves.recall, "attention kept"),
    ):
        for at, (name, colour) in enumerate(zip(names, colours, strict=True)):
            heads = values[:, at].reshape(len(lengths), -1)
            one.plot(lengths, heads.mean(axis=1), "o-", color=colour, label=name, markersize=4)
            low, high = np.percentile(heads, (10, 90), axis=1)
            one.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        one.set(xscale="log", xlabel="tokens", title=words)
        one.set_xticks(lengths)
        one.xaxis.set_major_formatter(EngFormatter(sep=""))
        one.xaxis.set_minor_locator(NullLocator())
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.grid(alpha=0.3)
    axes[0].set_ylabel("mean; 10th to 90th % of heads")
    axes[0].axhline(0, color="0.4", linewidth=0.8)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_ylim(0, 1.02)
    return figure
