"""Patterns of one head, and the pattern of every head of a model as arrays."""

import dataclasses
import enum
from pathlib import Path
from typing import Self, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Keys that one unit of a block-sparse budget stands for (paper, Algorithm 3: block_size = 64).
BLOCK_SIZE = 64


def _check(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Every key at or before the query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape:
    """The first keys and a local window (StreamingLLM; paper, Table 1).

    Attributes:
        sink_size: leading keys every query sees.
        window_size: nearest keys every query sees, itself included.
    """

    sink_size: int
    window_size: int

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a size that is no size."""
        _check("sink_size", self.sink_size, 0)
        _check("window_size", self.window_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriShape:
    """A-shape, and the last queries see every key.

    Attributes:
        sink_size: leading keys every query sees.
        window_size: nearest keys every query sees, itself included.
        last_size: last queries that attend densely.
    """

    sink_size: int
    window_size: int
    last_size: int

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a size that is no size."""
        _check("sink_size", self.sink_size, 0)
        _check("window_size", self.window_size, 1)
        _check("last_size", self.last_size, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash:
    """The key columns and the diagonals that the last queries weigh most (paper, Algorithm 2).

    Attributes:
        vertical_size: key columns, the forced ones included.
        slash_size: distances (query row - key column), the forced ones included.
        sink_size: leading columns taken first, inside the budget.
        window_size: smallest distances taken first, inside the budget.
    """

    vertical_size: int
    slash_size: int
    sink_size: int = 30
    window_size: int = 100

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a size that is no size."""
        _check("vertical_size", self.vertical_size, 0)
        _check("slash_size", self.slash_size, 1)
        _check("sink_size", self.sink_size, 0)
        _check("window_size", self.window_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """For each query block the key blocks of largest mean-pooled score (paper, Algorithm 3).

    Attributes:
        num_blocks: key blocks of 64 keys for each query block, the diagonal included. The kernel's
            tiles hold `block_kv` keys, so it visits ceil(num_blocks * 64 / block_kv) of them.
    """

    num_blocks: int

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a size that is no size."""
        _check("num_blocks", self.num_blocks, 1)


Pattern = Dense | AShape | TriShape | VerticalSlash | BlockSparse


class Kind(enum.IntEnum):
    """How a head's pattern is written in the arrays of HeadPatterns."""

    DENSE = 0
    A_SHAPE = 1
    TRI_SHAPE = 2
    VERTICAL_SLASH = 3
    BLOCK_SPARSE = 4


_TYPES: dict[Kind, type] = {
    Kind.DENSE: Dense,
    Kind.A_SHAPE: AShape,
    Kind.TRI_SHAPE: TriShape,
    Kind.VERTICAL_SLASH: VerticalSlash,
    Kind.BLOCK_SPARSE: BlockSparse,
}
_KINDS = {pattern: kind for kind, pattern in _TYPES.items()}
_SIZES = ("vertical_size", "slash_size", "sink_size", "window_size", "last_size", "num_blocks")


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeadPatterns:
    """The pattern of every head of a model: a pytree, so other values never recompile.

    The arrays are data; only the two capacities are static. A program compiled for these
    capacities runs every assignment of patterns whose budgets stay within them.

    Attributes:
        kind: Kind of each head, int32 [layers, heads].
        vertical_size, slash_size, sink_size, window_size, last_size, num_blocks: sizes of the
            head's pattern, 0 where the pattern has none; int32 [layers, heads].
        max_columns: no head's `vertical_size` or `sink_size` exceeds this (static).
        max_blocks: no head's `num_blocks` exceeds this; 0 leaves block-sparse heads out of the
            compiled program (static).
    """

    kind: Int[Array, "layers heads"]
    vertical_size: Int[Array, "layers heads"]
    slash_size: Int[Array, "layers heads"]
    sink_size: Int[Array, "layers heads"]
    window_size: Int[Array, "layers heads"]
    last_size: Int[Array, "layers heads"]
    num_blocks: Int[Array, "layers heads"]
    max_columns: int = dataclasses.field(metadata={"static": True})
    max_blocks: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_grid(
        cls,
        patterns: list[list[Pattern]],
        *,
        max_columns: int | None = None,
        max_blocks: int | None = None,
    ) -> Self:
        """Builds from `patterns[layer][head]`.

        Args:
            patterns: one pattern for each head of each layer.
            max_columns: capacity to compile for; the largest size in use, rounded up, if None.
            max_blocks: likewise for block-sparse budgets.

        Raises:
            ValueError: no layers, layers of different head counts, or a size above a capacity.
            TypeError: an entry is not a pattern.
        """
        if not patterns or not patterns[0]:
            raise ValueError("`patterns` must hold at least one layer of at least one head")
        heads = len(patterns[0])
        for number, layer in enumerate(patterns):
            if len(layer) != heads:
                raise ValueError(f"layer {number} has {len(layer)} heads, layer 0 has {heads}")
            for pattern in layer:
                if type(pattern) not in _KINDS:
                    names = ", ".join(known.__name__ for known in _KINDS)
                    raise TypeError(f"expected a pattern ({names}), got {pattern!r}")
        arrays = {
            name: np.array(
                [[getattr(pattern, name, 0) for pattern in layer] for layer in patterns], np.int32
            )
            for name in _SIZES
        }
        kind = np.array([[_KINDS[type(p)] for p in layer] for layer in patterns], np.int32)
        columns = int(max(arrays["vertical_size"].max(), arrays["sink_size"].max()))
        blocks = int(arrays["num_blocks"].max())
        capacities = {
            "max_columns": _capacity("max_columns", columns, max_columns),
            "max_blocks": _capacity("max_blocks", blocks, max_blocks),
        }
        return cls(
            kind=jnp.asarray(kind),
            **{name: jnp.asarray(sizes) for name, sizes in arrays.items()},
            **capacities,
        )

    @classmethod
    def uniform(cls, pattern: Pattern, *, num_layers: int, num_heads: int) -> Self:
        """The same pattern for every head."""
        _check("num_layers", num_layers, 1)
        _check("num_heads", num_heads, 1)
        return cls.from_grid([[pattern] * num_heads] * num_layers)

    @classmethod
    def load(cls, path: str | Path) -> "HeadPatterns":
        """Reads our own format or one of MInference's pattern files; see `minference_jax.files`."""
        from minference_jax import files

        return files.load_patterns(path)

    def save(self, path: str | Path) -> None:
        """Writes our own versioned JSON format."""
        from minference_jax import files

        files.save_patterns(self, path)

    @property
    def num_layers(self) -> int:
        """Layers described."""
        return self.kind.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self.kind.shape[1]

    def pattern(self, layer: int, head: int) -> Pattern:
        """The pattern of one head, as its dataclass."""
        return self.grid()[layer][head]

    def grid(self) -> list[list[Pattern]]:
        """`grid()[layer][head]`, the inverse of `from_grid`."""
        kinds = np.asarray(self.kind)
        sizes = {name: np.asarray(getattr(self, name)) for name in _SIZES}

        def one(layer: int, head: int) -> Pattern:
            made = _TYPES[Kind(int(kinds[layer, head]))]
            names = (field.name for field in dataclasses.fields(made))
            return made(**{name: int(sizes[name][layer, head]) for name in names})

        return [[one(layer, head) for head in range(kinds.shape[1])] for layer in range(len(kinds))]


def _capacity(name: str, needed: int, wanted: int | None) -> int:
    """The capacity to compile for: as given, else a power of two so that small changes fit."""
    if wanted is None:
        return 0 if needed == 0 else max(32, 1 << (needed - 1).bit_length())
    if wanted < needed:
        raise ValueError(f"`{name}` is {wanted}, but a pattern needs {needed}; raise it")
    return wanted
