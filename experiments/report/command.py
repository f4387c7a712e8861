"""`minference report`: the paper's tables and pictures from records."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.common.errors import UserError, check_writable
from experiments.common.options import OptionalPath
from experiments.report.headline import headline, replaced
from experiments.report.markdown import Drawing, text_of
from experiments.report.page import MARK, make_report, page
from experiments.report.read import KINDS, read_entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Make the paper's tables and pictures from records, the paper's own figures beside them.

    What was measured with other code, devices, options or samples is never in one table.
    """

    records: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="PATH [PATH ...]",
            help=f"Record files, and folders of them, of {', '.join(KINDS)}.",
            help_behavior_hint="",
        ),
    ] = ()
    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/report")
    """Folder of the report: README.md, and pictures in a folder of their own."""
    readme: OptionalPath = None
    """A Markdown file with the lines `<!-- results: begin -->` and `<!-- results: end -->`, between
    which headline tables are put."""

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        console = Console(stderr=True)
        report = make_report(read_entries(self.records, console))
        path = self.output / "README.md"
        if path.exists() and not _read(path).startswith(MARK):
            raise UserError(f"{path} was not made by this command; choose another --output")
        blocks = list(page(report, self.output))
        texts = {path: text_of(blocks)}
        if self.readme is not None:
            section = headline(report, path, self.readme.parent)
            texts[self.readme] = replaced(_read(self.readme), section, self.readme)
        check_writable(self.output, folder=True)
        for block in blocks:
            if isinstance(block, Drawing):
                block.draw(self.output / block.file)
        for written, text in texts.items():
            written.write_text(text, encoding="utf-8")
            Console().print(f"written: {written}", soft_wrap=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); check the path") from error
