"""Sparse attention driven by lists of key tiles and key columns."""

from typing import Literal, overload

from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import mosaic_gpu, reference, triton, xla
from pallas_kernels.block_sparse_attention.index import (
    ALIGNMENT,
    BlockSparseIndex,
    num_q_blocks,
    resolve_lengths,
)
from pallas_kernels.common.checks import check_attention_shapes, check_lengths
from pallas_kernels.common.dispatch import choose
from pallas_kernels.common.environment import not_hopper

Implementation = Literal["mosaic_gpu", "triton", "xla", "reference"]


@overload
def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
    return_residuals: Literal[False] = False,
) -> Float[Array, "batch q_len heads head_dim"]: ...


@overload
def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
    return_residuals: Literal[True],
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]: ...


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"] | None = None,
    q_offset: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
) -> (
    Float[Array, "batch q_len heads head_dim"]
    | tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]
):
    """Causal softmax attention of each query over the tiles and columns its index names.

    Scores are scaled by 1/sqrt(head_dim); the softmax runs in float32. K and V are never repeated
    to query heads. The result equals dense attention masked by `index.to_mask()`.

    Args:
        q: queries.
        k: keys; kv_heads divides heads.
        v: values.
        index: what each query tile visits; its arrays may be traced.
        lengths: real keys of each batch row, kv_len if None.
        q_offset: position of the first query among the keys, kv_len - q_len if None.
        implementation: which implementation runs; None takes the first of "mosaic_gpu" (Hopper),
            "triton" (other CUDA GPUs, needs jax-triton), "xla" that can serve, and logs the choice
            once.
        return_residuals: also return the log-sum-exp of the scaled scores, float32.

    Returns:
        The output in q's dtype (0 for a row that visits no key), and with `return_residuals` the
        log-sum-exp [batch, heads, q_len] (-inf for such a row).

    Raises:
        ValueError: shapes disagree, the index is not one for these shapes, or no implementation
            has that name.
        NotImplementedError: the implementation asked for cannot serve this call; says why.
    """
    check_attention_shapes(q, k, v)
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    expected = (batch, heads, num_q_blocks(q_len, index.block_q))
    if index.begin.shape != expected:
        raise ValueError(
            f"`index` is for [batch, heads, query tiles] {index.begin.shape}, but q {q.shape} with "
            f"block_q {index.block_q} needs {expected}; build the index from these arrays"
        )
    if index.block_q % ALIGNMENT or index.block_kv % ALIGNMENT:
        raise ValueError(
            f"`block_q` and `block_kv` must be multiples of {ALIGNMENT}, got {index.block_q} and "
            f"{index.block_kv}"
        )
    check_lengths(lengths, batch, kv_len)
    lengths, q_offset = resolve_lengths(batch, q_len, kv_len, lengths, q_offset)
    candidates = {
        "mosaic_gpu": (mosaic_gpu, not_hopper() or mosaic_gpu.unsupported(q, k, v, index)),
        "triton": (triton, triton.unsupported(q, k, v, index)),
        "xla": (xla, None),
        "reference": (reference, None),
    }
    run = choose("block_sparse_attention", implementation, candidates)
    out, lse = run.block_sparse_attention(q, k, v, index, lengths=lengths, q_offset=q_offset)
    out = out.astype(q.dtype)
    return (out, lse) if return_residuals else out
