"""What is kept of the prompt for decoding, as the command line asks for it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from experiments.common.errors import UserError, one_line
from experiments.common.options import OptionalText
from minference_jax.kv_cache import (
    DropKV,
    EightBitKV,
    KVCompression,
    PyramidKV,
    SnapKV,
    StreamingKV,
)

USAGE = "snapkv:BUDGET, pyramidkv:BUDGET, streaming:FIRST,LAST, or int8, fp8, int8:ONE_OF_THESE"


class Compression(NamedTuple):
    """A way to keep less than the whole cache, or to keep it in fewer bits.

    Attributes:
        label: name and sizes, written in one way only.
        make: the compression of a model of some layers.
    """

    label: str
    make: Callable[[int], KVCompression]


# What the sizes make, and how many they are.
_METHODS: dict[str, tuple[int, Callable[..., KVCompression]]] = {
    "snapkv": (1, lambda layers, budget: SnapKV(budget=budget)),
    "pyramidkv": (1, lambda layers, budget: PyramidKV.for_layers(layers, budget=budget)),
    "streaming": (2, lambda layers, *sizes: StreamingKV(*sizes)),
}


_EIGHT_BITS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def is_compression(spec: str) -> bool:
    """Returns whether this begins with the name of a compression."""
    return spec.partition(":")[0] in (*_EIGHT_BITS, *_METHODS)


def parse_compression(spec: str, *, option: str) -> Compression:
    """Returns a compression; raises UserError, which names the option, if it is none."""
    name, colon, written = spec.partition(":")
    if (dtype := _EIGHT_BITS.get(name)) is not None:
        if not colon:
            return Compression(name, lambda num_layers: EightBitKV(dtype=dtype))
        if written.partition(":")[0] in _METHODS:
            of = parse_compression(written, option=option)
            return Compression(
                f"{name}:{of.label}", lambda num_layers: EightBitKV(of.make(num_layers), dtype)
            )
    sizes = written.split(",")
    wanted, make = _METHODS.get(name, (0, None))
    if make is None or len(sizes) != wanted or not all(size.isdecimal() for size in sizes):
        raise UserError(f"{option} must be {USAGE}, got {spec}")
    numbers = [int(size) for size in sizes]
    try:
        make(1, *numbers)
    except ValueError as error:
        raise UserError(f"{option} cannot be {spec}: {one_line(error)}") from error
    label = f"{name}:{','.join(map(str, numbers))}"
    return Compression(label, lambda num_layers: make(num_layers, *numbers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The keys and values that new tokens attend to."""

    kv_cache: OptionalText = None
    """Keys of the prompt kept by each layer and head: snapkv:1024, pyramidkv:1024 (on average), or
    streaming:4,1020 (first and last ones); int8 or fp8: all, in 8 bits; int8:snapkv:1024: both;
    all if not given."""

    def __post_init__(self) -> None:
        """Raises UserError for a method or a budget that is none."""
        self.build(num_layers=1)

    def build(self, *, num_layers: int) -> KVCompression | None:
        """Returns the compression of a model, None to keep everything."""
        if self.kv_cache is None:
            return None
        return parse_compression(self.kv_cache, option="--kv-cache").make(num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCacheOptions(CacheOptions):
    """The keys and values that are kept of the prompt."""

    kv_cache: OptionalText = None
    """Keys of the prompt kept by each layer and head: snapkv:1024, pyramidkv:1024 (on average), or
    streaming:4,1020 (first and last ones); int8 or fp8: all, in 8 bits; int8:snapkv:1024: both;
    none; all if not given."""

    def build(self, *, num_layers: int) -> KVCompression | None:
        """Returns the compression of a model, None to keep everything."""
        return DropKV() if self.kv_cache == "none" else super().build(num_layers=num_layers)
