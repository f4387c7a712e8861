"""GGUF files: metadata and tensors, dequantised a few rows at a time."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models.common.weights.errors import LoadError

_DAMAGED = "the file is damaged or was not downloaded completely; download it again"


class _BoundedReader(gguf.GGUFReader):
    """The `gguf` reader, but it refuses reads past the end and does not box every array item.

    The parent slices past the end silently, so that a truncated file shows up as an unrelated numpy
    error, or as a loop over a corrupt count. Should a later version rename these hooks, reading
    still works, only slower and with less precise messages.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise LoadError(
                f"expected at least {end} bytes, the file has {len(self.data)}: {_DAMAGED}"
            )
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        types = [gguf.GGUFValueType.ARRAY] + ([item] if count else [])
        start = orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            end, parts = self._strings(start, count)
            return end - orig_offs, parts, list(range(count)), types
        if item in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[item], count)
            return 12 + int(values.nbytes), [values], [0], types
        return super()._get_field_parts(orig_offs, raw_type)

    def _strings(self, offset: int, count: int) -> tuple[int, list[Any]]:
        data = memoryview(self.data)
        parts = []
        for _ in range(count):
            end = offset + 8 + int.from_bytes(data[offset : offset + 8], "little")
            if end > len(data) or end < offset + 8:
                raise LoadError(
                    f"expected at least {end} bytes, the file has {len(data)}: {_DAMAGED}"
                )
            parts.append(data[offset + 8 : end])
            offset = end
        return offset, parts


class GGUFFile:
    """One GGUF file, memory-mapped.

    Attributes:
        path: the file.
        metadata: every key's value; arrays as lists.
        shapes: each tensor's shape, rows first (the reverse of GGUF's own order).
    """

    def __init__(self, path: Path) -> None:
        """Reads the header of `path`.

        Raises:
            LoadError: the file is not GGUF, is truncated, or is one part of several.
        """
        self.path = path
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise LoadError(
                f"`{path}` is not a GGUF file: it must begin with b'GGUF', it begins with {magic!r}"
            )
        try:
            self._reader = _BoundedReader(path)
        except LoadError as error:
            raise LoadError(f"`{path}`: {error}") from None
        except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise LoadError(
                f"`{path}` has no readable GGUF header ({error}): {_DAMAGED}"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if (parts := self.metadata.get("split.count", 0)) > 1:
            raise LoadError(
                f"`{path}` is one of {parts} parts of a model; merge them first "
                "(`llama-gguf-split --merge`)"
            )

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Every key and value of the header."""
        try:
            return {key: field.contents() for key, field in self._reader.fields.items()}
        except UnicodeDecodeError as error:
            raise LoadError(f"`{self.path}` holds text that is not UTF-8: {_DAMAGED}") from error

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by tensor name, rows first."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of a tensor, dequantised to float32 (float16 and float32 as stored).

        Raises:
            LoadError: the `gguf` package cannot dequantise this tensor's type.
        """
        tensor = self._tensors[name]
        rows = tensor.data[start:stop]
        if rows.dtype in (np.float16, np.float32):
            return rows
        try:
            return gguf.quants.dequantize(rows, tensor.tensor_type)
        except NotImplementedError as error:
            raise LoadError(
                f"`{self.path}`: tensor `{name}` is stored as {tensor.tensor_type.name}, which the "
                "`gguf` package cannot dequantise; use another quantisation of this model"
            ) from error
