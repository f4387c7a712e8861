"""The Hopper attention kernel: lowered and interpreted on a CPU, compared on a GPU."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.block_sparse_attention import (
    mosaic_gpu,
    mosaic_gpu_kernel,
    reference,
    workloads,
    xla,
)
from pallas_kernels.common import dispatch
from tests.kernels.attention_cases import CASES, Case, mixed_index
from tests.kernels.mgpu_interpret import interpreted

_LINES = {"vertical": 40, "slash": 20, "spread": "clustered"}

# Small enough for the interpreter, which takes seconds for each.
_SMALL = [
    Case(
        name="staggered", index=workloads.vertical_slash_index,
        options=_LINES | {"staggered": True}, q_len=256, kv_len=256, heads=1, kv_heads=1,
        head_dim=64, block_kv=96,
    ),
    Case(
        name="ragged", index=workloads.vertical_slash_index, options=_LINES, q_len=70, kv_len=250,
        heads=2, kv_heads=1, head_dim=64, block_kv=64, lengths=(200,),
    ),
]  # fmt: skip

_name = lambda case: case.name


def _arrays(head_dim, dtype, num_columns, staggered, block_kv):
    sds = jnp.zeros
    i = jnp.int32
    index = mosaic_gpu.BlockSparseIndex(
        entries=sds((2, 4, 40), i), begin=sds((2, 4, 3), i), count=sds((2, 4, 3), i),
        origin=sds((2, 4, 3), i), columns=sds((2, 4, num_columns), i), column_count=sds((2, 4), i),
        block_q=128, block_kv=block_kv, shift=sds((2, 4, 3), i) if staggered else None,
    )  # fmt: skip
    kv = sds((2, 1000, 2, head_dim), dtype)
    return (sds((2, 333, 4, head_dim), dtype), kv, kv, index), (sds((2,), i), sds((), i))


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "block_kv", "dtype", "num_columns"),
    [
        (64, 64, jnp.bfloat16, 0),
        (64, 128, jnp.float16, 70),
        (96, 128, jnp.bfloat16, 70),
        (96, 96, jnp.float16, 70),
        (128, 64, jnp.float16, 70),
        (128, 96, jnp.bfloat16, 200),
        (128, 128, jnp.bfloat16, 0),
        (128, 128, jnp.bfloat16, 200),
        (256, 64, jnp.bfloat16, 70),
    ],
)
def test_lowers_for_cuda_without_a_gpu(head_dim, block_kv, dtype, num_columns, staggered):
    arrays, scalars = _arrays(head_dim, dtype, num_columns, staggered, block_kv)
    reason = mosaic_gpu.unsupported(*arrays)
    if staggered and head_dim == 256:
        assert "shared memory" in reason
        return
    assert reason is None
    run = lambda q, k, v, index, lengths, q_offset: mosaic_gpu.block_sparse_attention(
        q, k, v, index, lengths=lengths, q_offset=q_offset
    )
    text = jax.jit(run).trace(*arrays, *scalars).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1, "one launch serves all heads"


@pytest.mark.parametrize("case", _SMALL, ids=_name)
def test_interpreted_kernel_is_right_and_free_of_races(case):
    q, k, v, index, lengths, q_offset = case.build()
    with interpreted() as races_found:
        out, lse = mosaic_gpu.block_sparse_attention(
            q, k, v, index, lengths=lengths, q_offset=q_offset
        )
        jax.block_until_ready(out)
        assert not races_found()
    expected, expected_lse = reference.block_sparse_attention(
        q, k, v, index, lengths=lengths, q_offset=q_offset
    )
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def _is_free_barrier(ref):
    return ref.ref.aval.inner_aval.dtype.num_arrivals == 2


@pytest.mark.parametrize("forgotten", ["keys-arrived", "stage-read", "queries-read"])
def test_interpreter_catches_a_missing_wait(forgotten, monkeypatch, capfd):
    """The check above can fail: without one kind of wait it finds races or misused barriers."""
    q, k, v, index, lengths, q_offset = _SMALL[0].build()
    wait = mosaic_gpu_kernel.plgpu.barrier_wait
    if forgotten == "keys-arrived":
        monkeypatch.setattr(mosaic_gpu_kernel.Visit, "wait_keys", lambda self, n: None)
    elif forgotten == "queries-read":
        monkeypatch.setattr(mosaic_gpu_kernel.plgpu, "commit_smem", lambda: None)
    else:
        monkeypatch.setattr(
            mosaic_gpu_kernel.plgpu, "barrier_wait", lambda ref: _is_free_barrier(ref) or wait(ref)
        )
    caught = False
    with interpreted() as races_found:
        try:
            jax.block_until_ready(
                mosaic_gpu.block_sparse_attention(
                    q, k, v, index, lengths=lengths, q_offset=q_offset
                )
            )
            caught = races_found()
        except Exception:
            # A misused barrier stops the interpreter.
            caught = True
    assert caught


def _visited(index, q_len, kv_len):
    """The index's definition, key by key."""
    mask = np.zeros((*index.begin.shape[:2], q_len, kv_len), bool)
    arrays = (index.entries, index.begin, index.count, index.origin, index.later())
    entries, begin, count, origin, shift = map(np.asarray, arrays)
    columns, column_count = np.asarray(index.columns), np.asarray(index.column_count)
    for b, h, row in np.ndindex(*mask.shape[:3]):
        tile, within = divmod(row, index.block_q)
        at = origin[b, h, tile] + (within >= index.block_q // 2) * shift[b, h, tile]
        for j in range(count[b, h, tile]):
            start = at + entries[b, h, begin[b, h, tile] + j]
            mask[b, h, row, max(start, 0) : max(start + index.block_kv, 0)] = True
        mask[b, h, row, columns[b, h, : column_count[b, h]]] = True
        mask[b, h, row, kv_len - q_len + row + 1 :] = False
    return mask


@pytest.mark.parametrize("options", [{}, {"staggered": True}], ids=["plain", "staggered"])
def test_index_mask_counts_and_xla_agree_with_the_definition(options):
    case = Case(
        name="definition", index=mixed_index, options=options, q_len=300, kv_len=520, head_dim=16,
        block_kv=64, dtype="float32",
    )  # fmt: skip
    q, k, v, index, lengths, q_offset = case.build()
    mask = _visited(index, case.q_len, case.kv_len)
    np.testing.assert_array_equal(index.to_mask(case.q_len, case.kv_len), mask)
    pairs, _ = index.visited_pairs(case.q_len, case.kv_len)
    np.testing.assert_array_equal(pairs, mask.sum((2, 3)))
    run = lambda f: f.block_sparse_attention(q, k, v, index, lengths=lengths, q_offset=q_offset)
    for got, expected in zip(run(xla), run(reference), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_automatic_choice_is_logged_once(caplog):
    q, k, v, index, lengths, q_offset = _SMALL[1].build()
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels.common.dispatch"):
        for _ in range(2):
            block_sparse_attention(q, k, v, index, lengths=lengths, q_offset=q_offset)
    assert len(caplog.records) == 1
    assert "block_sparse_attention: implementation" in caplog.text
    [name] = [x for x in ("mosaic_gpu", "triton", "xla") if f"implementation {x} " in caplog.text]
    assert name in dispatch.used_implementations()["block_sparse_attention"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernel may run here")
def test_explicit_choice_that_cannot_serve_says_why():
    q, k, v, index, lengths, _ = _SMALL[1].build()
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*compute capability 9\.0"):
        block_sparse_attention(q, k, v, index, lengths=lengths, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16"),
        ({"head_dim": 80}, "head_dim"),
        ({"block_kv": 32}, "block_kv"),
    ],
    ids=lambda x: str(x),
)
def test_unsupported_shapes_are_declined_with_the_reason(change, reason):
    case = Case(name="declined", index=mixed_index, q_len=8, kv_len=8, **change)
    assert reason in mosaic_gpu.unsupported(*case.build()[:4])


def _plain_attention(q, k, v, mask):
    """Masked attention in the inputs' own precision, float32 only inside the softmax."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[3] ** -0.5, -jnp.inf)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0).astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _poison_free_memory(nbytes):
    jax.block_until_ready(jnp.full((nbytes // 4,), jnp.nan, jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_kernel_on_the_gpu(case):
    q, k, v, index, lengths, q_offset = case.build()
    if (reason := mosaic_gpu.unsupported(q, k, v, index)) is not None:
        pytest.skip(reason)
    run = jax.jit(mosaic_gpu.block_sparse_attention)
    jax.block_until_ready(run(q, k, v, index, lengths=lengths, q_offset=q_offset))
    _poison_free_memory(2**28)
    out, lse = run(q, k, v, index, lengths=lengths, q_offset=q_offset)
    expected, expected_lse = reference.block_sparse_attention(
        q, k, v, index, lengths=lengths, q_offset=q_offset
    )
    assert bool(jnp.all(jnp.isfinite(out)))
    mask = index.to_mask(case.q_len, case.kv_len, lengths=lengths, q_offset=q_offset)
    plain = _plain_attention(q, k, v, mask).astype(jnp.float32)
    error = lambda x: float(np.max(np.abs(x - expected)))
    assert error(out.astype(jnp.float32)) <= 2.0 * error(plain) + 1e-6
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    bound = 4e-3 if case.dtype == "bfloat16" else 6e-4
    assert rms(out.astype(jnp.float32) - expected) <= bound * rms(expected)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)

    again = run(q, k, v, index, lengths=lengths, q_offset=q_offset)
    assert bool(jnp.all(again[0] == out)), "two runs differ"
