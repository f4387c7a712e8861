"""Results as JSON lines: one object per run, stamped with the environment that produced it.

A record is `{"schema": 1, "kind": ..., "environment": {...}, "config": {...}, "result": {...}}`.
Files are appended to, so that runs collect, and read back with `read_records`.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.common.dispatch import used_implementations
from pallas_kernels.common.environment import git_revision

SCHEMA_VERSION = 1
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Returns what a reader needs to judge a figure: code, libraries, machine, date, command."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # The program's folder is this machine's business.
        "argv": [Path(argv[0]).name, *argv[1:]] if argv else [],
        "git": git_revision(),
        "minference_jax": _version("minference-jax"),
        **{name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "implementations": used_implementations(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


def append_record(
    path: Path, *, kind: str, argv: Sequence[str], config: Any, result: dict[str, Any]
) -> dict[str, Any]:
    """Appends one record to a JSONL file and returns it.

    Args:
        path: the file; created, with its folder, if missing.
        kind: what was run, e.g. `generate`.
        argv: the command line.
        config: a dataclass with everything that was asked for.
        result: figures; numbers, strings, lists, dicts and numpy arrays.
    """
    record = make_record(kind=kind, argv=argv, config=config, result=result)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def make_record(
    *, kind: str, argv: Sequence[str], config: Any, result: dict[str, Any]
) -> dict[str, Any]:
    """Returns a record as its file holds it; see `append_record`."""
    record = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "environment": environment(argv),
        "config": dataclasses.asdict(config),
        "result": result,
    }
    return json.loads(json.dumps(record, default=_as_json, allow_nan=False))


def read_records(path: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, of one kind if given, oldest first.

    Raises:
        ValueError: a line is no record, or one of another schema version.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        record = parse_record(line, f"{path}, line {number}")
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def parse_record(line: str, place: str) -> dict[str, Any]:
    """Returns the record in a line.

    Args:
        line: of a JSONL file.
        place: what errors call it.

    Raises:
        ValueError: it is no record, or one of another schema version.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{place}: expected a record of schema {SCHEMA_VERSION}, "
            f"got {version}; write it again with this version of the project"
        )
    return record


def remove_cut_line(path: Path) -> None:
    """Removes a last line that a kill cut off: one is written with its end, or is not whole."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
