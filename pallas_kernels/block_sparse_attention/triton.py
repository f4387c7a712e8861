"""The op as one Triton kernel for all heads, through jax-triton: GPUs before Hopper.

Nothing heavy is imported here: `jax_triton` and `triton` are imported when the op runs.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.block_sparse_attention.plan import Plan, gather_columns, make_plan
from pallas_kernels.common.environment import default_device

HEAD_DIMS = (64, 96, 128, 256)

# Keys whose column bits share one word; a key tile must hold whole words.
_WORD = 32
_MIN_BLOCK_M = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs; the index alone decides what it computes.

    Attributes:
        block_m: query rows of one program, at most.
        block_n: keys of one softmax step, at most.
        num_warps: warps of one program.
        num_stages: depth of the pipeline of key and value copies.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By head_dim (padded to a power of two) and rows that share a list (64 standing for all that 128
# does not divide, as the halves of staggered tiles): block_m, block_n, num_warps, num_stages.
_CONFIGS = {
    (64, 128): (128, 64, 4, 3),
    (64, 64): (64, 64, 4, 3),
    (128, 128): (128, 64, 8, 3),
    (128, 64): (64, 64, 4, 3),
    (256, 128): (128, 32, 8, 3),
    (256, 64): (64, 32, 4, 2),
}
# Where a block has 99 KB of shared memory instead of 163: 8.6, 8.9 and 12.x.
_SMALL = _CONFIGS | {(256, 128): (128, 32, 8, 2)}


def default_config(head_dim: int, rows: int, compute_capability: int) -> Config:
    """The choice for a head size, rows that share a list and compute capability (80 for 8.0)."""
    small = compute_capability in (86, 89) or compute_capability >= 120
    table = _SMALL if small else _CONFIGS
    block_m, block_n, num_warps, num_stages = table[
        _padded(head_dim), 128 if rows % 128 == 0 else 64
    ]
    return Config(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    compute_capability: int | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """Output in q's dtype and log-sum-exp in float32.

    Args:
        q: queries, bfloat16 or float16.
        k: keys, in q's dtype.
        v: values, in q's dtype.
        index: what each query tile visits.
        lengths: real keys of each batch row.
        q_offset: position of the first query among the keys.
        compute_capability: what to compile for (80 for 8.0); that of the default device if None.
        config: blocks, warps and stages; `default_config` if None.

    Raises:
        NotImplementedError: this implementation cannot serve, with the reason.
    """
    if compute_capability is None:
        compute_capability = _device_capability()
    reason = _unsupported(q, k, v, index, compute_capability)
    if reason is not None or compute_capability is None:
        raise NotImplementedError(f"the Triton kernel {reason}")
    if config is None:
        config = default_config(q.shape[3], index.block_q // index.halves, compute_capability)
    plan = make_plan(index, lengths=lengths, q_offset=q_offset)
    return _launch(q, k, v, index, lengths, plan, config, compute_capability)


def unsupported(q: Array, k: Array, v: Array, index: BlockSparseIndex) -> str | None:
    """Why this implementation cannot serve on the default device, None if it can."""
    return _unsupported(q, k, v, index, _device_capability())


def _unsupported(q, k, v, index, capability: int | None) -> str | None:
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return (
            "needs q, k and v all in bfloat16 or all in float16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if q.shape[3] not in HEAD_DIMS:
        return f"needs head_dim to be one of {HEAD_DIMS}, got {q.shape[3]}"
    if index.block_kv % _WORD:
        return f"needs `block_kv` to be a multiple of {_WORD}, got {index.block_kv}"
    if index.block_q % (_MIN_BLOCK_M * index.halves):
        return (
            f"needs `block_q` to be a multiple of {_MIN_BLOCK_M * index.halves}, got "
            f"{index.block_q}"
        )
    if capability is None:
        return f"needs a CUDA device, the default device is {default_device()}"
    if capability < 80:
        return (
            "needs compute capability 8.0 or later, the device has "
            f"{capability // 10}.{capability % 10}"
        )
    try:
        _import_triton()
    except ImportError as error:
        return f"needs the packages `jax-triton` and `triton`: {error}"
    return None


def _launch(q, k, v, index, lengths, plan: Plan, config: Config, capability: int):
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    triton_call, kernel = _import_triton()
    lists, ids, bits = plan
    tiles = lists.shape[2]
    block_m = min(config.block_m, _power_of_two_divisor(index.block_q // index.halves))
    block_n = min(config.block_n, _power_of_two_divisor(index.block_kv))
    has_columns = ids.shape[2] > 0
    if has_columns:
        # A column past the end is masked by its bit, but its value must be finite: take key 0.
        inside = jnp.where(index.columns < lengths[:, None, None], index.columns, 0)
        columns = gather_columns(k, v, dataclasses.replace(index, columns=inside))
    else:
        columns, ids, bits = (k, v), index.entries, index.entries
    return triton_call(
        q, k, v, index.entries, lists, *columns, ids, bits,
        q_len, kv_len, tiles, index.entries.shape[2], ids.shape[2],
        kernel=kernel,
        out=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
        ),
        grid=(batch * heads * tiles * (index.block_q // block_m),),
        name="block_sparse_attention",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=capability,
        SCALE=head_dim**-0.5 * math.log2(math.e),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=_padded(head_dim),
        BLOCK_Q=index.block_q,
        BLOCK_KV=index.block_kv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        WIDTH=_slice_width(head_dim, block_m, capability),
        HALVES=index.halves,
        HAS_COLUMNS=has_columns,
        FIELDS=lists.shape[3],
    )  # fmt: skip


def _slice_width(head_dim: int, block_m: int, capability: int) -> int:
    """Dimensions of the output that one product adds to.

    With mma.sync (before 9.0, and 12.x) slices are no wider than they have rows: only then does
    Triton give each warp whole rows of both products, so that the softmax stays within a warp.
    """
    width = _padded(head_dim)
    return width if 90 <= capability < 120 else min(width, max(block_m, 64))


def _device_capability() -> int | None:
    """Compute capability of the default device (90 for 9.0), None if it is no CUDA device."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    # ROCm devices are of platform "gpu" as well; their capability is a name such as gfx942.
    if device.platform != "gpu" or not (major + minor).isdigit():
        return None
    return int(major) * 10 + int(minor)


def _import_triton():
    """jax-triton's call, with one name for the outputs in all its versions, and the kernel."""
    import jax_triton

    from pallas_kernels.block_sparse_attention.triton_kernel import attention_kernel

    renamed = "out_type" in inspect.signature(jax_triton.triton_call).parameters

    def call(*args, out, **kwargs):
        kwargs["out_type" if renamed else "out_shape"] = out
        return jax_triton.triton_call(*args, **kwargs)

    return call, attention_kernel


def _padded(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


def _power_of_two_divisor(n: int) -> int:
    return n & -n
