"""Column and diagonal sums of the last queries' attention."""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.common.checks import check_lengths
from pallas_kernels.common.dispatch import choose
from pallas_kernels.common.environment import not_hopper
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
        implementation: which implementation runs; None takes the first of "mosaic_gpu" (Hopper),
            "xla" that can serve, and logs the choice once.

    Returns:
        `vertical` and `slash`, float32 [batch, heads, kv_len]; slash is indexed by distance.

    Raises:
        ValueError: heads is not a multiple of kv_heads, `lengths` reach beyond the keys, or no
            implementation has that name.
        NotImplementedError: the implementation asked for cannot serve this call; says why.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"`q` heads ({q.shape[2]}) must be a multiple of `k` heads ({k.shape[2]})")
    check_lengths(lengths, q.shape[0], k.shape[1])
    candidates = {
        "mosaic_gpu": (mosaic_gpu, not_hopper() or mosaic_gpu.unsupported(q, k)),
        "xla": (xla, None),
        "reference": (reference, None),
    }
    run = choose("line_scores", implementation, candidates)
    return run.line_scores(q, k, first=first, lengths=lengths)
