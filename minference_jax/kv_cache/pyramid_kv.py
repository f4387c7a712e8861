"""PyramidKV: SnapKV with budgets that fall from the first layer to the last."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache.snap_kv import Pooling, check_vote, keep_voted
from minference_jax.kv_cache.types import KeptKV, check_prompt_shapes


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PyramidKV:
    """Keeps what SnapKV keeps, more in early layers and less in late ones: a KVCompression.

    Without the window, a layer keeps on average B = budget - window keys, the last B / beta, and
    the first 2 B less that, or all keys of a prompt that has no more. Of a prompt shorter than 2 B
    all layers keep B. Opposite layers keep 2 B together, so all keep exactly as many as SnapKV;
    layers share one program and therefore one capacity, that of the first, which is up to twice the
    budget. Make one with `PyramidKV.for_layers`.

    Attributes:
        layer: this layer's number; `[layers]` for a model.
        num_layers: how many there are (static).
        budget: mean of the keys kept by the layers, of each row and head (static).
        window: as in `SnapKV` (static).
        kernel_size: as in `SnapKV` (static).
        pooling: as in `SnapKV` (static).
        beta: B over the last layer's share (static).
    """

    layer: Int[Array, "*layers"]
    num_layers: int = dataclasses.field(metadata={"static": True})
    budget: int = dataclasses.field(default=4096, metadata={"static": True})
    window: int = dataclasses.field(default=32, metadata={"static": True})
    kernel_size: int = dataclasses.field(default=7, metadata={"static": True})
    pooling: Pooling = dataclasses.field(default="max", metadata={"static": True})
    beta: int = dataclasses.field(default=20, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a size out of range."""
        check_vote(self)
        if self.num_layers < 1 or self.beta < 1:
            raise ValueError(
                f"PyramidKV needs `num_layers` and `beta` of at least 1, got {self.num_layers} and "
                f"{self.beta}"
            )

    @classmethod
    def for_layers(cls, num_layers: int, **sizes) -> "PyramidKV":
        """The compression of a whole model; `sizes` are the attributes from `budget` on."""
        return cls(layer=jnp.arange(num_layers, dtype=jnp.int32), num_layers=num_layers, **sizes)

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row."""
        share = self.budget - self.window
        return self.window + 2 * share - share // self.beta

    def layer_budgets(self, lengths: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Keys that this layer keeps of rows of these lengths, the window among them."""
        share, last = self.budget - self.window, self.num_layers - 1
        high = jnp.minimum(self.capacity, lengths) - self.window
        low = 2 * share - high
        mirrored = jnp.minimum(self.layer, last - self.layer)
        step = mirrored * (high - low) // max(last, 1)
        falling = jnp.where(2 * self.layer < last, high - step, low + step)
        level = (lengths < 2 * share) | (high <= share) | (2 * self.layer == last)
        return self.window + jnp.where(level, share, falling)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_start: Int[Array, " batch"] | None = None,
    ) -> KeptKV:
        """What stays of one layer; see `KVCompression`.

        Raises:
            ValueError: shapes disagree, or this is the compression of a whole model.
        """
        check_prompt_shapes(q, k, v, lengths, q_start)
        if jnp.ndim(self.layer):
            raise ValueError(
                f"this is the compression of {self.num_layers} layers: give one layer its own with "
                "`jax.tree.map(lambda x: x[i], compression)`"
            )
        if lengths is None:
            lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        return keep_voted(
            q, k, v, lengths=lengths, q_start=q_start, budgets=self.layer_budgets(lengths),
            capacity=self.capacity, window=self.window, kernel_size=self.kernel_size,
            pooling=self.pooling,
        )  # fmt: skip
