"""Column and diagonal sums of the last queries' attention."""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.line_scores import mosaic_gpu, reference, xla

Implementation = Literal["mosaic_gpu", "xla", "reference"]


def line_scores(
    q: Float[Array, "batch last_q heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    first: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch heads kv_len"], Float[Array, "batch heads kv_len"]]:
    """Sums the causal softmax of a few queries by key column and by distance (paper, Algorithm 2).

    With P the softmax of q k^T / sqrt(head_dim) for the queries at positions first, first + 1, …:
    vertical[j] = sum over rows r of P[r, j]; slash[t] = sum over rows r of P[r, first + r - t].

    Args:
        q: the last queries of each batch row.
        k: all keys; kv_heads divides heads.
        first: position of q's first row.
        lengths: real keys of each batch row; queries at or beyond it weigh nothing.
        implementation: which implementation runs; None chooses one for the default device.

    Returns:
        `vertical` and `slash`, float32 [batch, heads, kv_len]; slash is indexed by distance.

    Raises:
        ValueError: heads is not a multiple of kv_heads, or the implementation is unknown.
        NotImplementedError: the implementation asked for does not run here; the message says why.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"`q` heads ({q.shape[2]}) must be a multiple of `k` heads ({k.shape[2]})")
    implementations = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"unknown implementation {implementation!r}; expected one of {list(implementations)}"
        )
    reason = None if implementation in ("xla", "reference") else _declined(q, k)
    if implementation == "mosaic_gpu" and reason:
        raise NotImplementedError(f"`implementation='mosaic_gpu'` cannot serve this call: {reason}")
    if implementation is None:
        implementation = "xla" if reason else "mosaic_gpu"
    run = implementations[implementation].line_scores
    return run(q, k, first=first, lengths=lengths)


def _declined(q: Array, k: Array) -> str | None:
    """Why the Hopper kernel does not serve these arrays on the default device."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "none")
    if device.platform != "gpu" or capability.split(".")[0] != "9":
        return f"it needs a Hopper GPU, the default device is {device.device_kind}"
    return mosaic_gpu.unsupported(q, k)
