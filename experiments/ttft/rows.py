"""Rows of a record of times to first token: what was measured, and how a file is read."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.record import read_records

KIND = "ttft"
# Seconds, bytes and shares, and what belongs to them; see `whole.measure` and `parts`.
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What one record measures; a restarted run knows by it what it already has.

    Attributes:
        model: name of the model, or of the shape whose weights are random.
        random_weights: whether weights are random.
        rope_scaling: how the context is stretched.
        text: names of the texts.
        length: tokens of the prompt.
        method: label of the attention.
        sha256: of what the method's file holds.
        densities: the real model whose visited blocks are prescribed to random weights.
        kv_cache: what may be kept of the prompt, in the order of preference.
        chunk_size: tokens read at once, all if None.
        dtype: of weights and activations.
        layers: of the model.
        timed_layers: layers that were run; fewer than `layers` where the rest is extrapolated.
        mesh: devices that share the work, as `tp=2,cp=2`; None for one.
    """

    model: str
    random_weights: bool
    rope_scaling: str | None
    text: str
    length: int
    method: str
    sha256: str | None
    densities: str | None
    kv_cache: tuple[str, ...]
    chunk_size: int | None
    dtype: str
    layers: int
    timed_layers: int
    mesh: str | None = None

    @property
    def devices(self) -> int:
        """How many devices share the work."""
        parts = () if self.mesh is None else self.mesh.split(",")
        return math.prod(int(part.partition("=")[2]) for part in parts)

    @property
    def extrapolated(self) -> bool:
        """Whether only some layers were run."""
        return self.timed_layers < self.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The newest figures of every point of one device, and the environment of the newest."""

    figures: dict[Point, Figures]
    environment: dict[str, Any]


def read_rows(path: Path, *, like: dict[str, Any] | None = None) -> Rows:
    """Reads the rows of a record file, none if there is no such file.

    Args:
        path: JSONL file.
        like: an environment: only rows of its device and revision are read; if None, those of the
            file's last device and of any revision.

    Raises:
        ValueError: a line is no record.
    """
    records = read_records(path, kind=KIND) if path.exists() else []
    names = ("device", "git") if like is not None else ("device",)
    like = like or (records[-1]["environment"] if records else {})
    alike = lambda record: all(record["environment"][x] == like[x] for x in names)
    return rows_of([record for record in records if alike(record)])


def rows_of(records: Sequence[dict[str, Any]]) -> Rows:
    """Returns what records of `minference ttft` hold, the newest figures of every point."""
    figures = {}
    for record in records:
        config = record["config"]
        figures[Point(**config | {"kv_cache": tuple(config["kv_cache"])})] = record["result"]
    return Rows(figures=figures, environment=records[-1]["environment"] if records else {})
