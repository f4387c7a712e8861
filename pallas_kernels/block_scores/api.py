"""Softmax of query rows over mean keys, summed over the rows of each query tile."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores import mosaic_gpu, reference, xla
from pallas_kernels.common.dispatch import choose
from pallas_kernels.common.environment import not_hopper
from pallas_kernels.common.tiling import cdiv

Implementation = Literal["mosaic_gpu", "xla", "reference"]


def block_scores(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    means: Float[Array, "batch kv_heads num_means head_dim"],
    *,
    past: Int[Array, " tiles"],
    real_rows: Int[Array, " batch"],
    tile_rows: int,
    implementation: Implementation | None = None,
) -> Float[Array, "batch kv_heads lists tiles num_means"]:
    """Scores of mean keys for each query tile and list.

    Each row takes the softmax of q · mean / sqrt(head_dim) over the first means, those in the past
    of its whole tile. A score is the sum of that over a tile's real rows in all members of a list.

    Args:
        q: query rows (or means of several), the heads by the list that they share.
        means: mean keys, of any blocks.
        past: how many of the means, from the first on, each tile sees; more than all are all.
        real_rows: rows from here on count nothing, whatever they hold.
        tile_rows: rows of a tile; the last tile may have fewer.
        implementation: which implementation runs; None takes the first of "mosaic_gpu" (Hopper),
            "xla" that can serve, and logs the choice once.

    Returns:
        float32; 0 where a tile does not see a mean.

    Raises:
        ValueError: shapes do not fit together, or no implementation has that name.
        NotImplementedError: the implementation asked for cannot serve this call; says why.
    """
    _check(q, means, past, real_rows, tile_rows)
    candidates = {
        "mosaic_gpu": (mosaic_gpu, not_hopper() or mosaic_gpu.unsupported(q, means)),
        "xla": (xla, None),
        "reference": (reference, None),
    }
    run = choose("block_scores", implementation, candidates)
    # A kernel would write scores of means that do not exist.
    past = jnp.clip(past, 0, means.shape[2])
    return run.block_scores(q, means, past=past, real_rows=real_rows, tile_rows=tile_rows)


def _check(q, means, past, real_rows, tile_rows):
    """Raises ValueError unless the arrays fit together."""
    fits = (q.shape[0], q.shape[2], q.shape[5])
    if q.ndim != 6 or means.ndim != 4 or (means.shape[0], means.shape[1], means.shape[3]) != fits:
        raise ValueError(
            "`q` [batch, rows, kv_heads, lists, members, head_dim] and `means` [batch, kv_heads, "
            f"num_means, head_dim] must agree, got shapes {q.shape} and {means.shape}"
        )
    if 0 in q.shape or 0 in means.shape:
        raise ValueError(f"an axis is empty: `q` {q.shape}, `means` {means.shape}")
    if tile_rows < 1 or past.shape != (cdiv(q.shape[1], tile_rows),):
        raise ValueError(
            f"`past` must hold one number for each tile of {tile_rows} of the {q.shape[1]} rows, "
            f"got shape {past.shape}"
        )
    if real_rows.shape != (q.shape[0],):
        raise ValueError(f"`real_rows` must have shape ({q.shape[0]},), got {real_rows.shape}")
