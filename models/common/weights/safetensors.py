"""Hugging Face directories of safetensors files, single or sharded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from models.common.weights.errors import LoadError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32", "F64")


class SafetensorsDirectory:
    """The tensors of a checkpoint directory, read from memory-mapped files."""

    def __init__(self, directory: Path) -> None:
        """Opens the weight files of `directory`.

        Raises:
            LoadError: there are none, some are missing or damaged, or hold other than floats.
        """
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        quantised = []
        for path in _weight_files(directory):
            try:
                file = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise LoadError(
                    f"`{path}` is not a complete safetensors file ({error}); download it again"
                ) from error
            for name in file.keys():  # noqa: SIM118, this is no mapping
                view = file.get_slice(name)
                if view.get_dtype() not in _FLOATS:
                    quantised.append(f"{name} ({view.get_dtype()})")
                self._files[name] = file
                self._shapes[name] = tuple(view.get_shape())
        if quantised:
            raise LoadError(
                f"`{directory}` holds quantised or integer tensors, expected "
                f"{', '.join(_FLOATS)}: {', '.join(quantised)}. Use the unquantised weights, or a "
                "GGUF file."
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by tensor name."""
        return self._shapes

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of a tensor, in its stored dtype."""
        return self._files[name].get_slice(name)[start:stop]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise LoadError(
                f"`{index}` is no index of safetensors files (a JSON object with `weight_map`); "
                "download it again"
            ) from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise LoadError(
                f"`{directory}` lacks {len(missing)} of the {len(names)} files that `{_INDEX}` "
                f"names: {', '.join(missing)}; download them"
            )
        return [directory / name for name in names]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    other = sorted(path.name for path in directory.glob("*.bin"))
    hint = f" Only safetensors are read, convert {', '.join(other)} to them." if other else ""
    raise LoadError(f"`{directory}` has neither `{_SINGLE}` nor `{_INDEX}`.{hint}")
