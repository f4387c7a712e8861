"""From a checkpoint's named tensors to the parameter tree, checked first and then streamed.

A `Naming` says where each stored tensor goes. Stored matrices are `[out, in]` as in PyTorch and
GGUF; a parameter called `kernel` is `[in, out]` with its axes split into heads, so it is the
transpose, while embeddings, norms and biases keep their order.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

from models.common.weights.errors import LoadError, summarise_names

_CHUNK_ELEMENTS = 1 << 22
_ALIGNMENT = 64  # JAX takes over a host buffer without a copy when it is aligned like this.


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors of a checkpoint, readable a few rows at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, rows (outputs) first."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of one tensor, as a floating-point array."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How one kind of checkpoint names and lays out a decoder's tensors.

    Attributes:
        tensors: stored name, with `{layer}` for the layer's number, to the parameters that its rows
            hold, one after the other, as dotted paths. More than one parameter: a fused tensor.
        interleaved: parameters whose rows were reordered by the writer from rotation pairs
            `(i, i + head_dim/2)` to `(2i, 2i+1)` within each head; loading restores the order.
        ignored: patterns of stored tensors that carry nothing the model needs.
    """

    tensors: Mapping[str, tuple[str, ...]]
    interleaved: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


def linear(stored: str, *parameters: str) -> dict[str, tuple[str, ...]]:
    """A stored linear layer's weight and bias, to the projections whose rows it holds in order."""
    return {
        f"{stored}.weight": tuple(f"{parameter}.kernel" for parameter in parameters),
        f"{stored}.bias": tuple(f"{parameter}.bias" for parameter in parameters),
    }


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The stored tensors of one pattern (one, or one per layer) and the parameters they fill."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]


Place = Callable[[str, np.ndarray], jax.Array]


def load_params(
    source: TensorSource,
    naming: Naming,
    target: PyTree,
    *,
    place: Place | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fills the parameter tree from a checkpoint.

    One parameter at a time is gathered in a host buffer of the target dtype and handed to `place`;
    beyond it and what was placed, only a few rows of one tensor are in memory.

    Args:
        source: the checkpoint.
        naming: where its tensors go.
        target: the tree of `jax.ShapeDtypeStruct` to fill.
        place: puts a finished host buffer on the device(s), given its dotted path; by default on
            the default device, without a copy where that is the CPU.
        on_tensor: called with (tensors done, tensors in all) as loading proceeds.

    Returns:
        The tree of arrays.

    Raises:
        LoadError: tensors are missing, unknown or of another shape; all of them are listed, and
            nothing has been read.
    """
    place = place or (lambda path, buffer: jax.device_put(buffer))
    leaves = flatten_paths(target)
    entries = _plan(source, naming, leaves)
    filled: dict[str, jax.Array] = {}
    done, total = 0, sum(len(entry.names) for entry in entries)
    for entry in entries:
        buffers = {path: _aligned_empty(leaves[path]) for path in entry.paths}
        for layer, name in enumerate(entry.names):
            start = 0
            for path, rows in zip(entry.paths, entry.rows, strict=True):
                buffer = buffers[path][layer] if path.startswith("layers.") else buffers[path]
                order = _head_order(buffer.shape, path) if path in naming.interleaved else None
                for low, high in _chunks(rows, entry.shape):
                    values = source.read(name, start + low, start + high)
                    _store(buffer, path, values, low, order)
                start += rows
            done += 1
            if on_tensor is not None:
                on_tensor(done, total)
        for path in entry.paths:
            filled[path] = place(path, buffers.pop(path))
    return unflatten_paths(filled)


def flatten_paths(tree: PyTree) -> dict[str, Any]:
    """A nested dict's leaves by dotted path."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in flat}


def unflatten_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have these dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _plan(source: TensorSource, naming: Naming, leaves: Mapping[str, Any]) -> list[_Entry]:
    """Matches stored tensors with parameters; raises with everything that does not fit."""
    stored = source.shapes
    entries = [
        _entry(pattern, paths, leaves)
        for pattern, paths in naming.tensors.items()
        if all(path in leaves for path in paths)
    ]
    entries = _without_unused_layouts(entries, stored)
    expected = {name: entry.shape for entry in entries for name in entry.names}
    missing = [name for name in expected if name not in stored]
    unknown = [
        name
        for name in stored
        if name not in expected and not any(re.fullmatch(p, name) for p in naming.ignored)
    ]
    misshapen = [
        f"{name} is {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    _raise_if_any(missing, unknown, misshapen)
    return entries


def _without_unused_layouts(entries: list[_Entry], stored: Mapping[str, Any]) -> list[_Entry]:
    """Of fused and separate tensors that could fill a parameter, keeps the stored ones."""
    by_path: dict[str, list[_Entry]] = {}
    for entry in entries:
        for path in entry.paths:
            by_path.setdefault(path, []).append(entry)

    def found(entry: _Entry) -> int:
        return sum(name in stored for name in entry.names)

    dropped: set[tuple[str, ...]] = set()
    for rivals in by_path.values():
        best = max(rivals, key=found)
        dropped |= {rival.paths for rival in rivals if rival is not best}
    return [entry for entry in entries if entry.paths not in dropped]


def _entry(pattern: str, paths: tuple[str, ...], leaves: Mapping[str, Any]) -> _Entry:
    layered = "{layer}" in pattern
    rows, columns = [], ()
    for path in paths:
        shape = leaves[path].shape[1:] if layered else leaves[path].shape
        outputs, columns = _stored_shape(path, shape)
        rows.append(outputs)
    layers = range(leaves[paths[0]].shape[0]) if layered else range(1)
    return _Entry(
        names=tuple(pattern.format(layer=layer) for layer in layers),
        paths=paths,
        rows=tuple(rows),
        shape=(sum(rows), *columns),
    )


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows and remaining axes of the stored tensor behind one parameter."""
    if path.endswith(".kernel"):
        inputs = _input_axes(path)
        return math.prod(shape[inputs:]), (math.prod(shape[:inputs]),)
    if path.endswith(".bias"):
        return math.prod(shape), ()
    return shape[0], shape[1:]


def _input_axes(path: str) -> int:
    return 2 if path.endswith("o_proj.kernel") else 1  # o_proj contracts heads and head_dim


def _head_order(shape: tuple[int, ...], path: str) -> np.ndarray:
    """For each stored row of a `[heads, head_dim]` output, the row it belongs in."""
    heads, head_dim = shape[-2:]
    rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _chunks(rows: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    for low in range(0, rows, step):
        yield low, min(rows, low + step)


def _store(
    buffer: np.ndarray, path: str, values: np.ndarray, low: int, order: np.ndarray | None
) -> None:
    """Writes stored rows `low:` of one parameter into its buffer, in the buffer's dtype."""
    rows: Any = slice(low, low + len(values))
    if order is not None:
        rows = order[rows]
    if path.endswith(".kernel"):
        inputs = math.prod(buffer.shape[: _input_axes(path)])
        buffer.reshape(inputs, -1)[:, rows] = values.T
    elif path.endswith(".bias"):
        buffer.reshape(-1)[rows] = values
    else:
        buffer[rows] = values


def _aligned_empty(leaf: Any) -> np.ndarray:
    dtype = np.dtype(leaf.dtype)
    size = math.prod(leaf.shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(leaf.shape)


def _raise_if_any(missing: list[str], unknown: list[str], misshapen: list[str]) -> None:
    problems = []
    for title, items in (
        ("missing", summarise_names(missing)),
        ("not part of this architecture", summarise_names(unknown)),
        ("of another shape than the configuration says", misshapen),
    ):
        if items:
            problems.append(f"  {title}:\n" + "\n".join(f"    {item}" for item in items))
    if problems:
        raise LoadError(
            "the checkpoint's tensors do not match its configuration; nothing was loaded.\n"
            + "\n".join(problems)
            + "\nUse the weights that belong to this configuration, all of them."
        )
