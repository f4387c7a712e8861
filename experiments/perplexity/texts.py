"""The texts whose perplexity is measured."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common.errors import UserError
from experiments.common.prompts import CHAPTER, packaged_chapter, read_book
from experiments.perplexity.measure import Text
from models import Model


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Returns the files named, and the .txt files of the folders named, in order.

    Raises:
        UserError: one does not exist, or a folder holds none.
    """
    files = []
    for path in paths:
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"there is no .txt file in {path}; name texts, or folders of them")
        files += inside
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no text {file}; check the path")
    return files


def encode_texts(
    model: Model,
    files: Sequence[Path],
    *,
    length: int,
    limit: int | None,
    seed: int,
    console: Console,
) -> list[Text]:
    """Returns the tokens of texts that are long enough; tells which are not.

    Args:
        model: the model.
        files: the texts; none stands for the chapter that comes with the project.
        length: tokens that a text must have.
        limit: texts at most, drawn at random; all if None.
        seed: of the draw.
        console: where texts that are too short are told.

    Raises:
        UserError: a file cannot be read, or no text is long enough.
    """
    files = list(files)
    if limit is not None:
        random.Random(seed).shuffle(files)
    named = ((file.name, read_book(file)) for file in files) if files else _chapter()
    texts: list[Text] = []
    longest = 0
    for name, text in named:
        tokens = np.asarray(model.tokenizer.encode(text), np.int32)
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            texts.append(Text(name, tokens[:length]))
        else:
            console.print(f"left out: {name} has {len(tokens):,} tokens", soft_wrap=True)
        if len(texts) == limit:
            break
    if not texts:
        raise UserError(
            f"no text has the {length} tokens of the longest --lengths, the longest text has "
            f"{longest}; name longer --texts"
        )
    return texts


def _chapter() -> list[tuple[str, str]]:
    return [(CHAPTER, packaged_chapter())]
