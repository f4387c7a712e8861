"""What is kept of the prompt for decoding, as the command line asks for it."""

import dataclasses
from collections.abc import Callable

from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.options import OptionalText
from minference_jax.kv_cache import KVCompression, PyramidKV, SnapKV, StreamingKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The keys and values that new tokens attend to."""

    kv_cache: OptionalText = None
    """Keys of the prompt kept by each layer and head: snapkv:1024, pyramidkv:1024 (on average), or
    streaming:4,1020 (first and last ones); all if not given."""

    def __post_init__(self) -> None:
        """Raises UserError for a method or a budget that is none."""
        self.build(num_layers=1)

    def build(self, *, num_layers: int) -> KVCompression | None:
        """Returns the compression of a model, None to keep everything."""
        if self.kv_cache is None:
            return None
        name, _, written = self.kv_cache.partition(":")
        methods: dict[str, tuple[int, Callable[..., KVCompression]]] = {
            "snapkv": (1, lambda budget: SnapKV(budget=budget)),
            "pyramidkv": (1, lambda budget: PyramidKV.for_layers(num_layers, budget=budget)),
            "streaming": (2, StreamingKV),
        }
        sizes = written.split(",")
        wanted, make = methods.get(name, (0, None))
        if make is None or len(sizes) != wanted or not all(size.isdecimal() for size in sizes):
            raise UserError(
                "--kv-cache must be snapkv:BUDGET, pyramidkv:BUDGET or streaming:FIRST,LAST, got "
                f"{self.kv_cache}"
            )
        with reported_as_user_error(ValueError):
            return make(*map(int, sizes))
