"""The op on Hopper: one warp-specialised Pallas (Mosaic GPU) kernel for all heads of a layer.

One warpgroup copies key and value tiles into a ring of shared-memory stages; two more compute 64
query rows each. README.md explains the structure and what was measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.config import (
    BLOCK_Q,
    COMPUTE_WARPGROUPS,
    ROWS,
    Config,
    default_config,
)
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.block_sparse_attention.mosaic_gpu_kernel import Scratch, kernel
from pallas_kernels.block_sparse_attention.plan import Plan, gather_columns, make_plan

_HEAD_DIMS = (64, 96, 128, 256)
_BLOCK_KVS = (64, 96, 128)


def unsupported(q: Array, k: Array, v: Array, index: BlockSparseIndex) -> str | None:
    """Why this kernel cannot serve these arrays, None if it can."""
    head_dim = q.shape[3]
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"needs q, k and v all bfloat16 or all float16, got {sorted(dtypes)}"
    if head_dim not in _HEAD_DIMS:
        return f"needs head_dim in {_HEAD_DIMS}, got {head_dim}"
    if index.block_q != BLOCK_Q:
        return f"needs block_q {BLOCK_Q}, got {index.block_q}"
    if index.block_kv not in _BLOCK_KVS:
        return f"needs block_kv in {_BLOCK_KVS}, got {index.block_kv}"
    if default_config(head_dim, index.stage_rows) is None:
        return f"block_kv {index.block_kv} does not fit shared memory at head_dim {head_dim}"
    return None


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    config: Config | None = None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """Output in q's dtype and natural-log log-sum-exp; see `unsupported` for what it serves."""
    q_len = q.shape[1]
    config = config or default_config(q.shape[3], index.stage_rows)
    if config is None:
        raise NotImplementedError(f"mosaic_gpu {unsupported(q, k, v, index)}")
    # The bulk copies see rows in groups of 8; they fill rows past the end with zeros.
    q, k, v = (_pad_rows(x) for x in (q, k, v))
    plan = make_plan(index, lengths=lengths, q_offset=q_offset)
    columns = gather_columns(k, v, index) if plan.column_ids.shape[2] else None
    out, lse = _launch(q, k, v, index, plan, columns, config)
    return out[:, :q_len], lse[:, :, :q_len]


def _pad_rows(x):
    missing = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _launch(q, k, v, index, plan: Plan, columns, config: Config):
    batch, _, heads, head_dim = q.shape
    tiles = index.begin.shape[2]
    swizzle = plgpu.find_swizzle(head_dim * 16)
    # The value product takes keys in groups as wide as the swizzle.
    v_swizzle = min(swizzle, plgpu.find_swizzle(index.block_kv * 16))
    tile = lambda swizzle, *shape: plgpu.SMEM(
        shape,
        q.dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)),
    )
    full = lambda stages: plgpu.Barrier(num_barriers=stages)
    free = lambda stages: plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)
    scratch = Scratch(
        q=None
        if config.queries_in_registers
        else tile(swizzle, COMPUTE_WARPGROUPS, ROWS, head_dim),
        k=tile(swizzle, config.k_stages, index.stage_rows, head_dim),
        v=tile(v_swizzle, config.v_stages, index.stage_rows, head_dim),
        q_full=full(COMPUTE_WARPGROUPS),
        k_full=full(config.k_stages),
        v_full=full(config.v_stages),
        k_free=free(config.k_stages),
        v_free=free(config.v_stages),
    )
    body = functools.partial(
        kernel, config=config, block_kv=index.block_kv, staggered=index.staggered
    )
    arrays = [q, k, v, index.entries, plan.lists]
    if columns is not None:
        arrays += [*columns, plan.column_ids, plan.column_bits]
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch, tiles * BLOCK_Q, heads, head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * BLOCK_Q), jnp.float32),
        ],
        # Tiles of one head side by side: those that run at a time visit nearby keys.
        grid=(batch * heads, tiles),
        grid_names=("head", "tile"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={"scratch": scratch},
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="block_sparse_attention",
    )(*arrays)
