"""The op as one Triton kernel for all heads, through jax-triton: GPUs before Hopper.

Nothing heavy is imported here: `jax_triton` and `triton` are imported when the op runs.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import plan as planning
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, num_q_blocks, tiles_after
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


# By head_dim (padded to a power of two) and rows of a query tile, 64 standing for fewer than 128:
# block_m, block_n, num_warps, num_stages.
_CONFIGS = {
    (64, 128): (128, 64, 4, 3),
    (64, 64): (64, 64, 4, 3),
    (128, 128): (128, 64, 8, 3),
    (128, 64): (64, 64, 4, 3),
    (256, 128): (128, 32, 8, 3),
    (256, 64): (64, 64, 8, 2),
}
# What differs where a block has 99 KB of shared memory (8.6, 8.9 and 12.x).
_SMALL = {(256, 128): (64, 32, 4, 2), (256, 64): (64, 32, 4, 2)}


def default_config(head_dim: int, block_q: int, compute_capability: int) -> Config:
    """The choice for a head size, rows of a query tile and compute capability (80 for 8.0)."""
    key = _padded(head_dim), 128 if block_q % 128 == 0 else 64
    small = compute_capability in (86, 89) or compute_capability >= 120
    choice = _SMALL.get(key, _CONFIGS[key]) if small else _CONFIGS[key]
    block_m, block_n, num_warps, num_stages = choice
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
    index = unstagger(index, q.shape[1])
    if config is None:
        config = default_config(q.shape[3], index.block_q, compute_capability)
    lists, columns = _schedule(index, lengths, q_offset)
    return _launch(q, k, v, index, lengths, lists, columns, config, compute_capability)


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


def unstagger(index: BlockSparseIndex, q_len: int) -> BlockSparseIndex:
    """The same visits with half as many rows a query tile, so that all its rows share one list."""
    if index.shift is None:
        return index
    block_q = index.block_q // 2
    tiles = num_q_blocks(q_len, block_q)
    both = lambda first, second: jnp.stack([first, second], axis=3).reshape(*first.shape[:2], -1)[
        ..., :tiles
    ]
    return dataclasses.replace(
        index,
        begin=both(index.begin, index.begin),
        count=both(index.count, index.count),
        origin=both(index.origin, index.origin + index.shift),
        shift=None,
        block_q=block_q,
    )


def _schedule(index, lengths, q_offset):
    """Scalars of each query tile [batch, heads, tiles, 8], and its columns: ids and bits."""
    capacity = index.entries.shape[2]
    plan = planning.make_plan(index, lengths=lengths, q_offset=q_offset)

    def one_head(entries, begin, count, origin, bits, length):
        first_row = q_offset + jnp.arange(begin.shape[0]) * index.block_q
        begin = jnp.clip(begin, 0, capacity - 1)
        # Tiles that hold a key before 0 come last, those with a future or padding key first.
        tail = count - tiles_after(entries, begin, count, origin, jnp.int32(-1))
        limit = jnp.minimum(first_row + 1, length) - index.block_kv
        front = tiles_after(entries, begin, count, origin, limit)
        front = jnp.minimum(front, count - tail)
        word = jnp.arange(1, bits.shape[1] + 1)
        columns = jnp.max(jnp.where(bits != 0, word[None, :], 0), axis=1, initial=0) * _WORD
        fields = (begin, count, origin, front, tail, first_row, length, columns)
        return jnp.stack([jnp.broadcast_to(x, begin.shape) for x in fields], axis=1)

    over_heads = jax.vmap(jax.vmap(one_head, in_axes=(0, 0, 0, 0, 0, None)))
    lists = over_heads(
        index.entries, index.begin, index.count, index.origin, plan.column_bits, lengths
    )
    return lists.astype(jnp.int32), (plan.column_ids, plan.column_bits)


def _launch(q, k, v, index, lengths, lists, columns, config, capability):
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    triton_call, kernel = _import_triton()
    tiles = lists.shape[2]
    block_m = min(config.block_m, _power_of_two_divisor(index.block_q))
    block_n = min(config.block_n, _power_of_two_divisor(index.block_kv))
    ids, bits = columns
    has_columns = ids.shape[2] > 0
    if has_columns:
        # A column past the end is masked by its bit, but its value must be finite: take key 0.
        inside = jnp.where(index.columns < lengths[:, None, None], index.columns, 0)
        gathered = planning.gather_columns(k, v, dataclasses.replace(index, columns=inside))
    else:
        gathered, ids, bits = (k, v), index.entries, index.entries
    # Key/value heads with the longest lists first.
    work = jnp.sum(lists[..., 1] * index.block_kv + lists[..., 7], axis=2, dtype=jnp.float32)
    order = jnp.argsort(-jnp.sum(work.reshape(batch * kv_heads, -1), axis=1)).astype(jnp.int32)
    out = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
    )
    return triton_call(
        q, k, v, index.entries, lists, order, *gathered, ids, bits,
        q_len, kv_len, tiles, index.entries.shape[2], ids.shape[2],
        kernel=kernel,
        out=out,
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
        HAS_COLUMNS=has_columns,
        FIELDS=lists.shape[3],
    )  # fmt: skip


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
