"""`minference perplexity`: how well methods predict texts of growing length, beside dense."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.common.calibration import Attentions
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.fingerprint import fingerprint
from experiments.common.methods import for_model, parse_whole_cache_methods, usage
from experiments.common.options import LoadOptions, OptionalInt, at_least
from experiments.common.session import load
from experiments.evaluation.folder import (
    claim,
    claim_calibrations,
    claim_methods,
    settings_of,
    write_record,
)
from experiments.evaluation.options import DEFAULTS
from experiments.perplexity.measure import Mean, means, measure_all
from experiments.perplexity.plot import curves_picture
from experiments.perplexity.texts import encode_texts, files_of
from models.common.checks import check_context

# Options that may change when a run goes on: rows name their text and length.
_FREE = ("output", "limit", "seed", "texts", "lengths", "methods")
# Columns of text that the table needs.
_WIDTH = 110


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Measure perplexity of the beginnings of texts by their length, beside dense attention's."""

    model: LoadOptions
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=f"Methods that read the texts: {usage()}. More can be added to a run later.",
        ),
    ] = DEFAULTS
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
    """Folder of the run: rows of each method, a record and a picture. A run that was stopped goes
    on where it was."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least("limit", self.limit, 1)
        if not self.lengths:
            raise UserError("--lengths must name at least one length")
        at_least("lengths", min(self.lengths), 2)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        methods = parse_whole_cache_methods(
            self.methods, why="perplexity reads texts and decodes nothing"
        )
        files = files_of(self.texts)
        check_writable(self.output, folder=True)
        claim(self.output, {"kind": "perplexity", **settings_of(self, free=_FREE)})
        folders = claim_methods(self.output, methods)
        model = load(self.model, progress)
        claim(self.output, {"model_sha256": fingerprint(model)})
        methods = for_model(methods, model, progress)
        claim_methods(self.output, methods)
        attentions = Attentions(methods, model, chat=False)
        longest = max(self.lengths)
        with reported_as_user_error(ValueError):
            check_context(longest, model.config)
        texts = encode_texts(
            model, files, length=longest, limit=self.limit, seed=self.seed, console=progress
        )
        about = {
            method: claim_calibrations(
                folders[method.label], attentions.calibrations(method, self.lengths, asks=False)
            )
            for method in methods
        }
        rows = measure_all(
            {label: folder / "rows.jsonl" for label, folder in folders.items()},
            texts,
            sorted(set(self.lengths)),
            model,
            {
                method.label: functools.partial(attentions.at, method, asks=False)
                for method in methods
            },
        )
        curves = {label: means(of_method) for label, of_method in rows.items()}
        console.width = max(console.width, _WIDTH)  # a figure cut short would be lost
        console.print(_table(curves, title=f"perplexity of {Path(self.model.model).name}"))
        picture = curves_picture(
            curves, title=Path(self.model.model).name, path=self.output / "perplexity.png"
        )
        for method in methods:
            result = {
                "means": [mean._asdict() for mean in curves[method.label]],
                "rows": [dataclasses.asdict(row) for row in rows[method.label]],
                **about[method],
            }
            write_record(self.output, method, kind="perplexity", config=self, result=result)
        for path in (picture, self.output / "record.jsonl"):
            console.print(f"written: {path}", soft_wrap=True)


def _table(curves: dict[str, list[Mean]], *, title: str) -> Table:
    """All methods at one length, then at the next."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for name in ("tokens", "texts", "perplexity", "more", "KL", "top-1, %", "visited, %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*curves.values(), strict=True):
        table.add_section()
        for label, mean in zip(curves, row, strict=True):
            table.add_row(
                label,
                f"{mean.length:,}",
                str(mean.texts),
                f"{mean.perplexity:.3f}",
                f"{mean.perplexity - mean.dense_perplexity:+.3f}",
                f"{mean.kl:.4f}",
                f"{100 * mean.top1:.1f}",
                f"{100 * mean.density:.1f}",
            )
    return table
