"""Files of patterns and thresholds: versioned JSON, and MInference's `best_pattern` files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from minference_jax.adaptive import AdaptiveAttention
from minference_jax.adaptive import files as adaptive_files
from minference_jax.attention import SparseAttention
from minference_jax.patterns import (
    AShape,
    BlockSparse,
    Dense,
    HeadPatterns,
    Pattern,
    TriShape,
    VerticalSlash,
)

FORMAT = "minference_jax.head_patterns"
VERSION = 1

_NAMES: dict[str, type[Pattern]] = {
    "dense": Dense,
    "a_shape": AShape,
    "tri_shape": TriShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
}

# MInference's kernel ignores the sizes of its block-sparse entries and keeps 100 blocks of 64, uses
# (1000, 6096) for heads a file does not name, and forces 30 columns and 100 distances, with at
# least 30 and 50 of them.
_ORIGINAL_NUM_BLOCKS = 100
_ORIGINAL_MINIMA = (30, 50)
_ORIGINAL_FORCED = (30, 100)
_ORIGINAL_DEFAULT = ["vertical_and_slash", 1000, 6096, 1]


def load_attention(path: str | Path) -> SparseAttention | AdaptiveAttention:
    """Reads the attention of a model: a pattern file of either format, or a file of thresholds.

    `attention_size` says for how many layers and heads it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, none of these, of an unknown version, or an entry in it is
            no pattern or no parameter; names the layer and the head.
    """
    content = _read_json(path)
    if isinstance(content, dict) and content.get("format") == adaptive_files.FORMAT:
        try:
            return adaptive_files.from_content(content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return SparseAttention(_patterns_of(content, path))


def save_attention(
    attention: HeadPatterns | SparseAttention | AdaptiveAttention, path: str | Path
) -> None:
    """Writes patterns, or thresholds [layers, heads], so that `load_attention` reads them.

    Of a `SparseAttention` only the patterns are kept.

    Raises:
        ValueError: an adaptive attention that files cannot hold.
    """
    if isinstance(attention, AdaptiveAttention):
        rows = adaptive_files.to_content(attention).items()
        lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rows)
        Path(path).write_text(f"{{\n  {lines}\n}}\n", encoding="utf-8")
        return
    patterns = attention.patterns if isinstance(attention, SparseAttention) else attention
    save_patterns(patterns, path)


def attention_size(attention: SparseAttention | AdaptiveAttention) -> tuple[int, int]:
    """Layers and heads of an attention that was loaded."""
    layers, heads = jax.tree.leaves(attention)[0].shape
    return layers, heads


def load_patterns(path: str | Path) -> HeadPatterns:
    """Reads a pattern file of either format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, not a pattern file, of an unknown version, or an entry in
            it is not a pattern.
    """
    return _patterns_of(_read_json(path), path)


def _read_json(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pattern file at {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _patterns_of(content: Any, path: str | Path) -> HeadPatterns:
    try:
        if isinstance(content, list):
            return HeadPatterns.from_grid(_parse_original(content))
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return HeadPatterns.from_grid(_parse_own(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(content, dict) and content.get("format") == adaptive_files.FORMAT:
        raise ValueError(
            f"{path} holds thresholds, no patterns; `minference_jax.load_attention` reads both"
        )
    raise ValueError(
        f"{path} is neither a pattern file of this library (an object with format {FORMAT!r}) nor "
        "one of MInference's (a list with one entry for each layer)"
    )


def save_patterns(patterns: HeadPatterns, path: str | Path) -> None:
    """Writes our own format: one row of pattern numbers per layer into a table of patterns."""
    grid = patterns.grid()
    table: list[Pattern] = list(dict.fromkeys(p for layer in grid for p in layer))
    names = {made: name for name, made in _NAMES.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "patterns": [{"kind": names[type(p)], **dataclasses.asdict(p)} for p in table],
        "layers": [[table.index(p) for p in layer] for layer in grid],
    }
    rows = ",\n    ".join(json.dumps(row) for row in content["layers"])
    entries = ",\n    ".join(json.dumps(entry) for entry in content["patterns"])
    Path(path).write_text(
        f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n'
        f'  "patterns": [\n    {entries}\n  ],\n  "layers": [\n    {rows}\n  ]\n}}\n',
        encoding="utf-8",
    )


def save_original(
    patterns: HeadPatterns, path: str | Path, *, scores: Float[np.ndarray, "layers heads"]
) -> None:
    """Writes one of MInference's `best_pattern` JSON files.

    Vertical-slash sizes below the 30 columns and 50 diagonals that MInference uses at least are
    raised to them.

    Args:
        patterns: the pattern of every head.
        path: the file.
        scores: a number for each head that people read; MInference does not use it.

    Raises:
        ValueError: a pattern that these files cannot hold; see `check_original`.
    """
    layers = [
        {
            str(head): [*_to_original(pattern), float(scores[layer, head])]
            for head, pattern in enumerate(row)
        }
        for layer, row in enumerate(patterns.grid())
    ]
    rows = ",\n ".join(json.dumps(layer) for layer in layers)
    Path(path).write_text(f"[{rows}]\n", encoding="utf-8")


def check_original(pattern: Pattern) -> None:
    """Raises ValueError for a pattern that MInference's files cannot hold.

    They hold A-shape, vertical-slash with 30 forced columns and 100 forced diagonals, and
    block-sparse with 100 blocks.
    """
    _to_original(pattern)


def _to_original(pattern: Pattern) -> tuple[str, int, int]:
    if isinstance(pattern, AShape):
        return "stream_llm", pattern.sink_size, pattern.window_size
    if isinstance(pattern, VerticalSlash):
        if (pattern.sink_size, pattern.window_size) == _ORIGINAL_FORCED:
            least_columns, least_distances = _ORIGINAL_MINIMA
            columns = max(pattern.vertical_size, least_columns)
            return "vertical_and_slash", columns, max(pattern.slash_size, least_distances)
    elif pattern == BlockSparse(num_blocks=_ORIGINAL_NUM_BLOCKS):
        return "block_sparse", 1000, 6096  # as in the released search; no one reads them
    raise ValueError(
        f"MInference's pattern files cannot hold {pattern}; they hold AShape, VerticalSlash with "
        f"sink_size=30 and window_size=100, and BlockSparse(num_blocks={_ORIGINAL_NUM_BLOCKS})"
    )


def _parse_own(content: dict[str, Any]) -> list[list[Pattern]]:
    if content.get("version") != VERSION:
        raise ValueError(
            f"version {content.get('version')!r} of the pattern format; expected {VERSION}"
        )
    unknown = set(content) - {"format", "version", "patterns", "layers"}
    if unknown or "patterns" not in content or "layers" not in content:
        raise ValueError(f"expected the keys patterns and layers, got {sorted(content)}")
    table = [_parse_entry(entry) for entry in content["patterns"]]
    grid = []
    for number, layer in enumerate(content["layers"]):
        if any(not isinstance(at, int) or not 0 <= at < len(table) for at in layer):
            raise ValueError(f"layer {number} names a pattern outside 0..{len(table) - 1}: {layer}")
        grid.append([table[at] for at in layer])
    return grid


def _parse_entry(entry: dict[str, Any]) -> Pattern:
    sizes = dict(entry)
    kind = sizes.pop("kind", None)
    if kind not in _NAMES:
        raise ValueError(f"unknown pattern {kind!r}; expected one of {', '.join(_NAMES)}")
    try:
        return _NAMES[kind](**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pattern {entry}: {error}") from error


def _parse_original(content: list[Any]) -> list[list[Pattern]]:
    if not content or not all(isinstance(layer, dict) and layer for layer in content):
        raise ValueError("expected a list with one non-empty object for each layer")
    named = [{_head_number(key): entry for key, entry in layer.items()} for layer in content]
    heads = 1 + max(max(layer) for layer in named)
    return [
        [_from_original(layer.get(head, _ORIGINAL_DEFAULT)) for head in range(heads)]
        for layer in named
    ]


def _head_number(key: str) -> int:
    if not key.isdecimal():
        raise ValueError(f"expected head numbers as keys, got {key!r}")
    return int(key)


def _from_original(entry: list[Any]) -> Pattern:
    """One `[pattern, vertical, slash, score]` entry, with the minima MInference applies to it."""
    if not isinstance(entry, list) or len(entry) < 3:
        raise ValueError(f"expected [pattern, vertical size, slash size, score], got {entry!r}")
    name, first, second = entry[:3]
    if any(
        isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in (first, second)
    ):
        raise ValueError(f"sizes must be non-negative integers, got {entry!r}")
    if name == "vertical_and_slash":
        columns, distances = map(max, (first, second), _ORIGINAL_MINIMA)
        return VerticalSlash(vertical_size=columns, slash_size=distances)
    if name == "stream_llm":
        return AShape(sink_size=first, window_size=second)
    if name == "block_sparse":
        return BlockSparse(num_blocks=_ORIGINAL_NUM_BLOCKS)
    raise ValueError(
        f"unknown pattern {name!r}; expected vertical_and_slash, stream_llm or block_sparse"
    )
