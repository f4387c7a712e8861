"""Tables and links in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table, its first column aligned to the left and the others to the right."""
    body = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '\\|') for cell in row)} |" for row in body)


def below(path: Path, folder: Path) -> str | None:
    """Returns the way from a folder to a path below it, None if the path is elsewhere."""
    here, there = path.resolve(), folder.resolve()
    return here.relative_to(there).as_posix() if here.is_relative_to(there) else None


def link(path: Path, folder: Path) -> str:
    """Returns a link from a page in a folder to a file below it, the name of any other file.

    Folders that lie elsewhere are this machine's business, but for the one that a run is called by.
    """
    where = below(path, folder)
    return f"`{path.parent.name}/{path.name}`" if where is None else f"[{path.name}]({where})"


class Drawing(NamedTuple):
    """A picture of a page.

    Attributes:
        name: of its file, without ending.
        what: it shows, in words.
        draw: writes it to a path.
    """

    name: str
    what: str
    draw: Callable[[Path], object]

    @property
    def file(self) -> str:
        """Its file, from the page's folder."""
        return f"pictures/{self.name}.png"


Block = str | Drawing


def text_of(blocks: Iterable[Block]) -> str:
    """Returns a page."""
    words = (
        f"![{block.what}]({quote(block.file)})" if isinstance(block, Drawing) else block
        for block in blocks
    )
    return "\n\n".join(words) + "\n"


def short_revision(git: str | None) -> str:
    """Returns the beginning of a revision, and whether files differed from it."""
    if git is None:
        return "unknown"
    commit, plus, changes = git.partition("+")
    return commit[:7] + plus + changes


def percent(value: float) -> str:
    """Returns a share in percent, without the sign of percent."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """Returns a difference of shares in points, with its sign; no minus before nothing."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
