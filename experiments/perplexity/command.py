"""`minference perplexity`: how well texts of growing length are predicted, beside dense."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.common.attention import AttentionOptions
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.fingerprint import fingerprint
from experiments.common.options import LoadOptions, OptionalInt, at_least
from experiments.common.plotting import new_figure, save, short_tokens, wrapped
from experiments.common.session import load
from experiments.evaluation.folder import claim, settings_of, write_record
from experiments.perplexity.measure import Mean, means, measure_all
from experiments.perplexity.texts import encode_texts, files_of
from models.common.checks import check_context

# Options that may change when a run goes on: rows name their text and length.
_FREE = ("output", "limit", "seed", "texts", "lengths")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Measure perplexity of the beginnings of texts by their length, beside dense attention's."""

    model: LoadOptions
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    texts: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
    ] = ()
    """UTF-8 files, and folders of .txt files, each file a text (the paper: PG-19 books); a chapter
    if not given. Texts shorter than the longest length are left out."""
    lengths: tuple[int, ...] = (1000, 2000, 4000)
    """Tokens of the beginnings. The paper takes up to 100,000."""
    limit: OptionalInt = None
    """Texts at most, drawn at random; all if not given."""
    seed: int = 0
    """Seed of the draw."""
    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/perplexity")
    """Folder of the run: rows, a record and a picture. A run that was stopped goes on where it
    was."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least("limit", self.limit, 1)
        if not self.lengths:
            raise UserError("--lengths must name at least one length")
        at_least("lengths", min(self.lengths), 2)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        files = files_of(self.texts)
        check_writable(self.output, folder=True)
        self.attention.check_readable()
        claim(self.output, {"kind": "perplexity", **settings_of(self, free=_FREE)})
        model = load(self.model, progress)
        claim(self.output, {"model_sha256": fingerprint(model)})
        size = {"num_layers": model.config.num_layers, "num_heads": model.config.num_heads}
        attention = self.attention.build(**size)
        longest = max(self.lengths)
        with reported_as_user_error(ValueError):
            check_context(longest, model.config)
        texts = encode_texts(
            model, files, length=longest, limit=self.limit, seed=self.seed, console=progress
        )
        rows = measure_all(
            self.output / "rows.jsonl", texts, sorted(set(self.lengths)), model, attention
        )
        curve = means(rows)
        console.print(_table(curve, title=self.attention.describe()))
        picture = self._draw(curve)
        result = {
            "attention": self.attention.describe(),
            "means": [mean._asdict() for mean in curve],
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        record = write_record(self.output, kind="perplexity", config=self, result=result)
        for path in (picture, record):
            console.print(f"written: {path}", soft_wrap=True)

    def _draw(self, curve: list[Mean]) -> Path:
        figure, [axes] = new_figure(5.6, 3.8)
        lengths = [mean.length for mean in curve]
        for name, colour, marker, values in (
            ("dense", "0.35", "s--", [mean.dense_perplexity for mean in curve]),
            (self.attention.attention, "C0", "o-", [mean.perplexity for mean in curve]),
        ):
            axes.plot(lengths, values, marker, color=colour, label=name, markersize=4)
        axes.set(xlabel="length (tokens)", ylabel="perplexity")
        axes.set_xticks(lengths, [short_tokens(length) for length in lengths])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        texts = f"{curve[0].texts} text{'s' if curve[0].texts > 1 else ''}"
        title = f"{Path(self.model.model).name}, {texts}\n{self.attention.describe()}"
        axes.set_title(wrapped(title, figure), fontsize=8)
        return save(figure, self.output / "perplexity.png")


def _table(curve: list[Mean], *, title: str) -> Table:
    table = Table(title=f"perplexity: {title}")
    names = ("tokens", "texts", "dense", "this", "more", "KL", "top-1, %", "visited, %")
    for name in names:
        table.add_column(name, justify="right")
    for mean in curve:
        table.add_row(
            f"{mean.length:,}",
            str(mean.texts),
            f"{mean.dense_perplexity:.3f}",
            f"{mean.perplexity:.3f}",
            f"{mean.perplexity - mean.dense_perplexity:+.3f}",
            f"{mean.kl:.4f}",
            f"{100 * mean.top1:.1f}",
            f"{100 * mean.density:.1f}",
        )
    return table
