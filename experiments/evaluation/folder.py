"""The folder of a run: JSON lines that survive a kill, and the settings that all of them share."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.common.attention import AttentionOptions
from experiments.common.errors import UserError
from experiments.common.record import append_record, environment, remove_cut_line

_SETTINGS = "settings.json"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file, oldest first, none if it is missing.

    A last line that a kill cut off is removed from the file.

    Raises:
        UserError: another line is no JSON object, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        remove_cut_line(path)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is made again") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} holds lines that are no JSON objects; remove it")
    return lines


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one object; a kill leaves it whole, missing, or without the end of its line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def replace_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Writes a whole file; a kill leaves the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(value, allow_nan=False) + "\n" for value in values), "utf-8")
    os.replace(part, path)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Notes what a run is made with; once it has lines, it goes on with the same only.

    Args:
        folder: of the run; it exists.
        settings: by name; may be given in several calls, as they become known.

    Raises:
        UserError: the folder holds a run with others.
    """
    path = folder / _SETTINGS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = json.loads(json.dumps(settings, default=str))
    begun = any(folder.glob("*.jsonl"))
    for name, value in settings.items():
        if begun and known.get(name, value) != value:
            raise UserError(
                f"{folder} holds a run made with {name} = {known[name]}, this one has {value}; "
                "choose another --output, or remove that folder"
            )
    replace_lines(path, [known | settings])


def settings_of(config: Any, *, free: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a run that are known before its model is loaded.

    Args:
        config: a command's options, with its attention among them as `attention`.
        free: names of options that may change when a run goes on.

    Returns:
        All others by their dotted names, what a pattern file holds, and device and revision.
    """
    flat = _flat(dataclasses.asdict(config), "")
    chosen = {name: value for name, value in flat.items() if name not in free}
    # Where the model lies does not matter; what it holds is known once it is loaded.
    chosen["model.model"] = Path(config.model.model).name
    here = environment([])
    made = {name: here[name] for name in ("device", "git", "jax")}
    return chosen | made | {"patterns_sha256": _sha256_of(config.attention)}


def _sha256_of(attention: AttentionOptions) -> str | None:
    if attention.patterns is None or not Path(attention.patterns).is_file():
        return None  # a shipped one belongs to the revision
    return hashlib.sha256(Path(attention.patterns).read_bytes()).hexdigest()


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def write_record(folder: Path, *, kind: str, config: Any, result: dict[str, Any]) -> Path:
    """Writes the one record of a run, over that of an earlier, smaller part of it."""
    part, path = folder / "record.part", folder / "record.jsonl"
    part.unlink(missing_ok=True)
    append_record(part, kind=kind, argv=sys.argv, config=config, result=result)
    os.replace(part, path)
    return path
