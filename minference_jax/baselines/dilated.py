"""StreamingLLM with a dilated window (paper, section 4.1: "w/ dilated" and "w/ strided").

A row attends to the first tokens, to a local window and, behind it, to one in two tokens (or in
three, ...). Tiles of keys cannot leave out every second key, but the sequence can be taken apart
into its even and its odd positions: a window with gaps is a window without gaps of either. The
parts name disjoint keys and are joined by their log-sum-exps (`merged`).
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.attention import attend_for_output, take_layer
from minference_jax.baselines.window import Part, Tiling, first_keys_attention, window_attention
from minference_jax.pairs import CountedPairs
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.index import resolve_lengths
from pallas_kernels.common.checks import check_attention_shapes, check_lengths
from pallas_kernels.common.tiling import cdiv


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DilatedStreaming:
    """The first keys, a local window and a dilated one behind it: an AttentionFn for any model.

    A row at position p sees exactly the keys j <= p with j < `global_size`, or p - j <
    `local_size`, or p - j = `local_size` + n (`interval` + 1) < `local_size` + `dilated_size`.

    Attributes:
        global_size: first keys, seen by every row (static).
        local_size: nearest keys, the row's own among them (static).
        dilated_size: keys behind them of which one in `interval` + 1 is seen; with a `local_size`
            of 0 it starts with the row's own (static).
        interval: keys left out between two that are seen (static).
        block_q: query rows of a tile (static).
        block_kv: keys of a tile; None is 128, or 64 for heads wider than 128 (static).
        implementation: which kernel runs; None chooses one for the default device (static).
    """

    global_size: int = dataclasses.field(metadata={"static": True})
    local_size: int = dataclasses.field(metadata={"static": True})
    dilated_size: int = dataclasses.field(metadata={"static": True})
    interval: int = dataclasses.field(default=1, metadata={"static": True})
    block_q: int = dataclasses.field(default=128, metadata={"static": True})
    block_kv: int | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def __post_init__(self):
        """Raises ValueError for a size out of range."""
        for name in ("global_size", "local_size", "dilated_size", "interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if self.local_size + self.dilated_size < 1:
            raise ValueError(
                "a row must see itself: `local_size` or `dilated_size` must be at least 1, got 0"
            )

    layer = take_layer
    __call__ = attend_for_output

    def attend(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], CountedPairs]:
        """The output and how many pairs were visited.

        Raises:
            ValueError: shapes disagree, or a window is shorter than two tiles (and than the
                prompt), so that its two ends would lie in one tile.
        """
        check_attention_shapes(q, k, v)
        check_lengths(lengths, q.shape[0], k.shape[1])
        lengths, q_offset = resolve_lengths(q.shape[0], q.shape[1], k.shape[1], lengths, q_offset)
        block_kv = self.block_kv or (64 if q.shape[3] > 128 else 128)
        tiling = Tiling(self.block_q, block_kv, self.implementation)
        parts = []
        if self.global_size > 0:
            parts.append(
                first_keys_attention(
                    q, k, v, self.global_size, lengths=lengths, q_offset=q_offset, tiling=tiling
                )
            )
        for first, size, stride in self._windows():
            if size > 0 and self.global_size < k.shape[1]:
                # Windows never see the first keys: these count once.
                rest = (x[:, self.global_size :] for x in (k, v))
                at = {
                    "lengths": lengths - self.global_size,
                    "q_offset": q_offset - self.global_size,
                }
                parts += window_attention(
                    q, *rest, first=first, size=size, stride=stride, tiling=tiling, **at
                )
        out = merged(parts).astype(q.dtype)
        keys = self._keys_of_rows(q_offset + jnp.arange(q.shape[1]))
        pairs = CountedPairs.of_rows(
            keys[None, None, :],
            functools.reduce(jnp.add, [part.executed for part in parts]),
            lengths=lengths,
            q_offset=q_offset,
        )
        return out, pairs

    def _windows(self):
        """First distance, number of distances and their stride, of both windows."""
        stride = self.interval + 1
        return (0, self.local_size, 1), (self.local_size, cdiv(self.dilated_size, stride), stride)

    def _keys_of_rows(self, position: Int[Array, " rows"]) -> Int[Array, " rows"]:
        """How many keys each row sees."""
        keys = jnp.minimum(position + 1, self.global_size)
        for first, size, stride in self._windows():
            keys += jnp.clip((position - self.global_size - first) // stride + 1, 0, size)
        return keys


def streaming_dilated(
    global_size: int = 1024, window_size: int = 8192, interval: int = 1
) -> DilatedStreaming:
    """StreamingLLM "w/ dilated" (paper, section 4.1): first keys, and a window with gaps."""
    return DilatedStreaming(
        global_size=global_size, local_size=0, dilated_size=window_size, interval=interval
    )


def streaming_strided(
    global_size: int = 1024, local_size: int = 2048, window_size: int = 4096, interval: int = 1
) -> DilatedStreaming:
    """StreamingLLM "w/ strided" (paper, section 4.1): a window without gaps before the other."""
    return DilatedStreaming(
        global_size=global_size, local_size=local_size, dilated_size=window_size, interval=interval
    )


def merged(parts: list[Part]) -> Float[Array, "batch q_len heads head_dim"]:
    """Attention over the union of disjoint key sets, from the output and log-sum-exp of each.

    Returns:
        The output, float32; 0 for a row that sees no key of any set.
    """
    top = functools.reduce(jnp.maximum, [part.lse for part in parts])
    top = jnp.where(jnp.isinf(top), 0.0, top)
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = functools.reduce(jnp.add, weights)
    total = jnp.where(total > 0.0, total, 1.0)
    of_rows = lambda weight: jnp.moveaxis(weight / total, 1, 2)[..., None]
    shares = [
        of_rows(weight) * part.out.astype(jnp.float32)
        for weight, part in zip(weights, parts, strict=True)
    ]
    return functools.reduce(jnp.add, shares)
