"""Rows of a latency record: what was measured, and how a file of them is read."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.common.record import read_records

Level = Literal["peer", "kernel", "layer"]
# Times in milliseconds and what belongs to them; see `run.measure_length`.
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What one record measures; a restarted run knows by it what it already has.

    Attributes:
        level: dense attention by others, attention over a given list, or a layer with its index.
        name: the peer, the workload or the pattern.
        layer: name of the layer whose shape is taken.
        length: tokens.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        dtype: of queries, keys and values.
        seed: of the layers' inputs.
    """

    level: Level
    name: str
    layer: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The newest figures of every point of one device, and the environments they come from.

    Attributes:
        figures: by point.
        environments: of the records, without repetition.
    """

    figures: dict[Point, Figures]
    environments: list[dict[str, Any]]


def read_rows(path: Path, *, like: dict[str, Any] | None = None) -> Rows:
    """Reads the rows of a record file, none if there is no such file.

    Args:
        path: JSONL file.
        like: an environment: only rows of its device and revision are read; if None, those of the
            file's last device and of any revision.

    Raises:
        ValueError: a line is no record.
    """
    records = read_records(path, kind="latency") if path.exists() else []
    if like is not None:
        same = ("device", "git")
        records = [r for r in records if all(r["environment"][x] == like[x] for x in same)]
    elif records:
        device = records[-1]["environment"]["device"]
        records = [r for r in records if r["environment"]["device"] == device]
    return rows_of(records)


def rows_of(records: Sequence[dict[str, Any]]) -> Rows:
    """Returns what records of `minference latency` hold, the newest figures of every point."""
    environments: list[dict[str, Any]] = []
    for record in records:
        short = {name: record["environment"][name] for name in ("date", "device", "git", "jax")}
        short["date"] = short["date"][:10]
        if short not in environments:
            environments.append(short)
    figures = {Point(**record["config"]): record["result"] for record in records}
    return Rows(figures=figures, environments=environments)
