"""The op on Hopper: one warp-specialised Pallas (Mosaic GPU) kernel for both passes of all heads.

README.md explains the structure.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores.mosaic_gpu_kernel import (
    BLOCK_ROWS,
    MEANS,
    ROWS,
    STAGES,
    WORKERS,
    Scratch,
    kernel,
)
from pallas_kernels.common.online_softmax import LOG2E
from pallas_kernels.common.tiling import round_up


def unsupported(q: Array, means: Array) -> str | None:
    """Why these arrays cannot be served; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or means.dtype != q.dtype:
        return f"needs bfloat16 or float16, got {q.dtype} and {means.dtype}"
    if q.shape[5] not in (64, 96, 128):
        return f"needs head_dim 64, 96 or 128, got {q.shape[5]}"
    return None


def block_scores(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    means: Float[Array, "batch kv_heads num_means head_dim"],
    *,
    past: Int[Array, " tiles"],
    real_rows: Int[Array, " batch"],
    tile_rows: int,
) -> Float[Array, "batch kv_heads lists tiles num_means"]:
    """Scores; memory is that of the result, for each member and 128 rows of a larger tile."""
    batch, rows, kv_heads, lists, members, head_dim = q.shape
    num_means, tiles = means.shape[2], past.shape[0]
    real = jnp.arange(tiles * tile_rows)[None, :] < real_rows[:, None]
    visible = jnp.where(real, jnp.repeat(past, tile_rows)[None, :], 0).astype(jnp.int32)
    q = q.reshape(batch, rows, -1, head_dim)
    width = _tile_width(tile_rows)
    if width != tile_rows:
        q = _widen(q, tiles, tile_rows, width)
        visible = _widen(visible, tiles, tile_rows, width)
    # The bulk copies see rows in groups of 8; they fill those past the end with zeros.
    q = _pad(q, 1, round_up(q.shape[1], 8))
    means = _pad(means, 2, round_up(num_means, 8))
    visible = _pad(visible, 1, round_up(visible.shape[1], BLOCK_ROWS))
    scores = _launch(q, means, visible, min(width, ROWS))
    parts = max(1, width // ROWS)
    scores = scores[:, :, : tiles * parts, :num_means]
    scores = scores.reshape(batch, kv_heads, lists, members, tiles, parts, num_means)
    # Added one after the other: the order of a reduction may depend on the number of means.
    every = [scores[:, :, :, m, :, p] for m in range(members) for p in range(parts)]
    return functools.reduce(jnp.add, every)


def _tile_width(tile_rows: int) -> int:
    """Rows that a tile takes: 8, 16, 32, 64 or a multiple of 128."""
    if tile_rows > ROWS:
        return round_up(tile_rows, ROWS)
    return max(8, 1 << (tile_rows - 1).bit_length())


def _widen(x, tiles, tile_rows, width):
    """Rows [batch, tiles * tile_rows or fewer, ...] with `width` rows for each tile."""
    x = _pad(x, 1, tiles * tile_rows)
    x = _pad(x.reshape(x.shape[0], tiles, tile_rows, *x.shape[2:]), 2, width)
    return x.reshape(x.shape[0], tiles * width, *x.shape[3:])


def _pad(x, axis, size):
    """Zeros at the end of an axis; nothing is copied where none are missing."""
    missing = size - x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad) if missing else x


def _launch(q, means, visible, width):
    """Scores [batch, heads, padded rows / width, padded means].

    Args:
        q: rows [batch, rows, heads, head_dim].
        means: mean keys [batch, kv_heads, num_means, head_dim].
        visible: means that each row sees [batch, padded rows], a multiple of a block's rows.
        width: rows whose weights are summed, a divisor of 128.
    """
    batch, _, heads, head_dim = q.shape
    padded_rows = visible.shape[1]
    columns = round_up(means.shape[2], MEANS)
    swizzle = plgpu.find_swizzle(head_dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    tile = lambda *shape: plgpu.SMEM((*shape, head_dim), q.dtype, transforms=transforms)
    launch = plgpu.kernel(
        functools.partial(kernel, width=width, scale=head_dim**-0.5 * LOG2E),
        out_type=jax.ShapeDtypeStruct((batch, heads, padded_rows // width, columns), jnp.float32),
        # Blocks of one head side by side: those that run at a time read the same means.
        grid=(batch * heads, padded_rows // BLOCK_ROWS),
        grid_names=("head", "block"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "scratch": Scratch(
                q=tile(WORKERS, ROWS),
                means=tile(STAGES, MEANS),
                lse=plgpu.SMEM((WORKERS, ROWS), jnp.float32),
                q_full=plgpu.Barrier(num_barriers=WORKERS),
                full=plgpu.Barrier(num_barriers=STAGES),
                free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
            )
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="block_scores",
    )
    groups = visible.reshape(batch, -1, ROWS)
    # Of each 128 rows: stages that every row sees in full, and those that any row sees.
    least, most = jnp.min(groups, axis=2), jnp.max(groups, axis=2)
    bounds = jnp.stack([least // MEANS, (most + MEANS - 1) // MEANS], axis=2)
    return launch(q, means, visible, bounds)
