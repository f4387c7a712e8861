"""Checks of user arrays, at trace time, before anything runs."""

import jax
import numpy as np
from jaxtyping import Array


def check_attention_shapes(q: Array, k: Array, v: Array) -> None:
    """Raises ValueError unless q, k and v are [batch, len, heads, head_dim] and fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"`{name}` must be [batch, len, heads, head_dim], got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"`{name}` has an empty axis: shape {x.shape}")
    if k.shape != v.shape:
        raise ValueError(f"`k` and `v` must have one shape, got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"`q` {q.shape} and `k` {k.shape} must agree in batch and head_dim")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"`q` heads ({q.shape[2]}) must be a multiple of `k` heads ({k.shape[2]})")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"`q` has {q.shape[1]} rows but `k` only {k.shape[1]}: causal attention aligned to the "
            "end needs q_len <= kv_len"
        )


def check_lengths(lengths: Array | None, batch: int, kv_len: int) -> None:
    """Raises ValueError unless lengths is [batch] and, where known now, within 1..kv_len."""
    if lengths is None:
        return
    if lengths.shape != (batch,):
        raise ValueError(f"`lengths` must have shape ({batch},), got {lengths.shape}")
    if isinstance(lengths, jax.core.Tracer):
        return
    values = np.asarray(lengths)
    if values.min() < 1 or values.max() > kv_len:
        raise ValueError(f"`lengths` must be within 1..{kv_len} (kv_len), got {values.tolist()}")
