"""`minference perplexity`: how well methods predict texts of growing length, beside dense."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments.common.calibration import Attentions
from experiments.common.errors import UserError, check_writable
from experiments.common.fingerprint import fingerprint
from experiments.common.kv_cache import USAGE
from experiments.common.methods import (
    Method,
    for_model,
    parse_methods,
    parse_whole_cache_methods,
    usage,
)
from experiments.common.options import LoadOptions, OptionalInt, at_least
from experiments.common.session import check_fits, load, sketch
from experiments.evaluation.folder import (
    claim,
    claim_calibrations,
    claim_methods,
    settings_of,
    write_record,
)
from experiments.evaluation.options import DEFAULTS
from experiments.perplexity.measure import Mean, Row, means, measure_all
from experiments.perplexity.plot import curves_picture
from experiments.perplexity.read import Reader
from experiments.perplexity.texts import encode_texts, files_of

# Options that may change when a run goes on: rows name their text and length.
_FREE = ("output", "limit", "seed", "texts", "lengths", "methods")
# Columns of text that the table needs beside the names of methods.
_WIDTH = 95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Measure perplexity of the beginnings of texts by their length, beside dense attention's.

    With --continuation, of their last tokens, read densely onto what is kept of those before.
    """

    model: LoadOptions
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=f"Methods that read the texts: {usage()}. With --continuation, a suffix says what "
            f"is kept of the prompt (dense+int8): +{USAGE}; everything if there is none. More can "
            "be added to a run later.",
        ),
    ] = DEFAULTS
    texts: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
    ] = ()
    """UTF-8 files, and folders of .txt files, each file a text (the paper: PG-19 books); a chapter
    if not given. Texts shorter than the longest length are left out."""
    lengths: tuple[int, ...] = (1000, 2000, 4000)
    """Tokens of the beginnings, the continuation among them. The paper takes up to 100,000."""
    continuation: OptionalInt = None
    """Last tokens of each beginning (512, say) that alone are scored: those before are the prompt,
    which the method reads, and they are read onto the cache of what is kept of it. All tokens are
    read at once and scored if not given."""
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
        # The first one is predicted by the prompt, whatever is kept of it.
        at_least("continuation", self.continuation, 2)
        if self.continuation is not None and self.continuation >= min(self.lengths):
            raise UserError(
                "--continuation must be below the shortest of --lengths, prompt and continuation "
                f"together ({min(self.lengths)}), got {self.continuation}"
            )

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        methods = _parse(self.methods, continuation=self.continuation)
        files, longest = files_of(self.texts), max(self.lengths)
        # What cannot be read or run is told before weights are read or files written.
        sketched = sketch(self.model)
        check_fits(longest, sketched)
        Attentions(methods, sketched, chat=False)
        texts = encode_texts(
            sketched, files, length=longest, limit=self.limit, seed=self.seed, console=progress
        )
        check_writable(self.output, folder=True)
        claim(self.output, {"kind": "perplexity", **settings_of(self, free=_FREE)})
        folders = claim_methods(self.output, methods)
        model = load(self.model, progress)
        claim(self.output, {"model_sha256": fingerprint(model)})
        methods = for_model(methods, model, progress)
        claim_methods(self.output, methods)
        attentions = Attentions(methods, model, chat=False)
        # Static lines are those of a prompt as long as what the attention reads.
        prompt = lambda length: length - (self.continuation or 0)
        prompts = [prompt(length) for length in self.lengths]
        about = {
            method: claim_calibrations(
                folders[method.label], attentions.calibrations(method, prompts, asks=False)
            )
            for method in methods
        }

        def reader(method: Method, length: int) -> Reader:
            attention = attentions.at(method, prompt(length), asks=False)
            return Reader(attention, method.compression(model.config.num_layers))

        rows = measure_all(
            {label: folder / "rows.jsonl" for label, folder in folders.items()},
            texts,
            sorted(set(self.lengths)),
            model,
            {method.label: functools.partial(reader, method) for method in methods},
            self.continuation,
        )
        self._tell(methods, rows, about, console)

    def _tell(
        self,
        methods: Sequence[Method],
        rows: dict[str, list[Row]],
        about: dict[Method, dict[str, Any]],
        console: Console,
    ) -> None:
        """Prints the table; writes records and picture."""
        curves = {label: means(of_method) for label, of_method in rows.items()}
        title = Path(self.model.model).name
        if self.continuation is not None:
            title += f", last {self.continuation} tokens"
        # A figure cut short would be lost.
        console.width = max(console.width, _WIDTH + max(map(len, curves)))
        console.print(_table(curves, title=f"perplexity of {title}"))
        picture = curves_picture(curves, title=title, path=self.output / "perplexity.png")
        for method in methods:
            result = {
                "means": [mean._asdict() for mean in curves[method.label]],
                "rows": [dataclasses.asdict(row) for row in rows[method.label]],
                **about[method],
            }
            write_record(self.output, method, kind="perplexity", config=self, result=result)
        for path in (picture, self.output / "record.jsonl"):
            console.print(f"written: {path}", soft_wrap=True)


def _parse(specs: Sequence[str], *, continuation: int | None) -> list[Method]:
    """The methods; what they keep of a prompt decides nothing unless something is read onto it."""
    if continuation is not None:
        return parse_methods(specs)
    why = "without --continuation (512, say) nothing is read onto what is kept of a prompt"
    return parse_whole_cache_methods(specs, why=why)


def _table(curves: dict[str, list[Mean]], *, title: str) -> Table:
    """All methods at one length, then at the next."""
    caches = any(mean.cache_bytes is not None for curve in curves.values() for mean in curve)
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    names = ("tokens", "texts", "perplexity", "more", "KL", "top-1, %", "visited, %")
    for name in (*names, *["cache, MiB"] * caches):
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*curves.values(), strict=True):
        table.add_section()
        for label, mean in zip(curves, row, strict=True):
            cache = "" if mean.cache_bytes is None else f"{mean.cache_bytes / 2**20:,.4g}"
            table.add_row(
                label,
                f"{mean.length:,}",
                str(mean.texts),
                f"{mean.perplexity:.3f}",
                f"{mean.perplexity - mean.dense_perplexity:+.3f}",
                f"{mean.kl:.4f}",
                f"{100 * mean.top1:.1f}",
                f"{100 * mean.density:.1f}",
                *[cache] * caches,
            )
    return table
