"""The folder of a run: JSON lines that survive a kill, and the settings that all of them share."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError, check_writable
from experiments.common.methods import Method
from experiments.common.record import environment, make_record, remove_cut_line

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


def append_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Appends objects; a kill leaves the first of them, the last one perhaps without its end."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


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
    known = _claimed(folder)
    settings = json.loads(json.dumps(settings, default=str))
    begun = any(any(folder.glob(lines)) for lines in ("*.jsonl", "*/*.jsonl"))
    for name, value in settings.items():
        if begun and known.get(name, value) != value:
            raise UserError(
                f"{folder} holds a run made with {name} = {known[name]}, this one has {value}; "
                "choose another --output, or remove that folder"
            )
    replace_lines(folder / _SETTINGS, [known | settings])


def _claimed(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def claim_methods(folder: Path, methods: Iterable[Method]) -> dict[str, Path]:
    """Makes a folder for each method in that of a run, and returns them by label.

    Raises:
        UserError: one cannot be written, or holds what a method of the same name with another file
            made.
    """
    folders = {method.label: folder / method.slug for method in methods}
    for method in methods:
        check_writable(folders[method.label], folder=True)
        about = {"method": method.label}
        if method.sha256 is not None:  # of what is recommended for a model it comes later
            about["patterns_sha256"] = method.sha256
        claim(folders[method.label], about)
    return folders


def claim_calibrations(folder: Path, found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Notes the calibration prompts of a method in its folder, and returns what its record says.

    Raises:
        UserError: the folder holds what was made with others.
    """
    found = list(found)
    claim(folder, {f"calibration_{one['length']}": one for one in found})
    return {"calibrations": found} if found else {}


def settings_of(config: Any, *, free: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a run that are known before its model is loaded.

    Args:
        config: a command's options.
        free: names of options that may change when a run goes on.

    Returns:
        All others by their dotted names, and device and revision.
    """
    options = flat(dataclasses.asdict(config))
    chosen = {name: value for name, value in options.items() if name not in free}
    # Where the model lies does not matter; what it holds is known once it is loaded.
    chosen["model.model"] = Path(config.model.model).name
    here = environment([])
    return chosen | {name: here[name] for name in ("device", "git", "jax")}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested options by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def write_record(
    folder: Path, method: Method, *, kind: str, config: Any, result: dict[str, Any]
) -> Path:
    """Writes a method's line of `record.jsonl`, over that of an earlier, smaller part of its run.

    Args:
        folder: of the run, whose settings name the model's digest.
        method: named in the result.
        kind: name of the command.
        config: its options.
        result: the figures.
    """
    path = folder / "record.jsonl"
    about = {
        "method": method.label,
        "patterns_sha256": method.sha256,
        "model_sha256": _claimed(folder)["model_sha256"],
    }
    record = make_record(kind=kind, argv=sys.argv, config=config, result=about | result)
    records = {line["result"]["method"]: line for line in read_lines(path)}
    if method.label in records:  # predictions that were there already ran in another process
        before = records[method.label]["environment"]["implementations"]
        here = record["environment"]["implementations"]
        record["environment"]["implementations"] = {
            name: sorted({*before.get(name, ()), *here.get(name, ())}) for name in before | here
        }
    replace_lines(path, [*(records | {method.label: record}).values()])
    return path
