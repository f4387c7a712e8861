"""The Triton kernel: what it declines, compiled and interpreted without a GPU, compared on one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import reference, triton, workloads
from tests.kernels.attention_cases import Case
from tests.kernels.triton_cases import (
    GPU_CASES,
    INTERPRETED_CASES,
    SMALL_BLOCK_CASES,
    poison_padding,
)

_ROOT = Path(__file__).parents[2]

_name = lambda case: case.name
_missing = lambda package: importlib.util.find_spec(package) is None

_attend = jax.jit(triton.block_sparse_attention)


@pytest.mark.skipif(_missing("triton"), reason="Triton's interpreter needs the package triton")
def test_interpreted_kernel_is_right():
    # In a process of its own: Triton decides on its interpreter when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_interpret"],
        cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count("ok ") == len(INTERPRETED_CASES) + len(SMALL_BLOCK_CASES)


def _abstract(dtype=jnp.bfloat16, dim=64, **options):
    q = jax.ShapeDtypeStruct((1, 300, 4, dim), dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, dim), dtype)
    options = {"vertical": 9, "slash": 30, "spread": "scattered"} | options
    return q, k, k, workloads.vertical_slash_index(1, 4, 300, 300, **options)


def _trace(arrays, compute_capability):
    def run(q, k, v, index, lengths, q_offset):
        return triton.block_sparse_attention(
            q, k, v, index, lengths=lengths, q_offset=q_offset,
            compute_capability=compute_capability,
        )  # fmt: skip

    lengths, q_offset = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1,), ()))
    return jax.jit(run).trace(*arrays, lengths, q_offset)


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        pytest.param({"dtype": jnp.float32}, 80, "bfloat16 or all in float16", id="dtype"),
        pytest.param({"dim": 32}, 80, r"head_dim .* got 32", id="head-dim"),
        pytest.param({"block_kv": 24}, 80, "`block_kv` to be a multiple of 32", id="block-kv"),
        pytest.param({"block_q": 24}, 80, "`block_q` to be a multiple of 16", id="block-q"),
        pytest.param(
            {"block_q": 48, "staggered": True}, 80, "`block_q` to be a multiple of 32", id="halves"
        ),
        pytest.param({}, 75, r"capability 8.0 or later, the device has 7.5", id="turing"),
    ],
)
def test_declines_what_it_cannot_serve(changes, capability, reason):
    with pytest.raises(NotImplementedError, match=reason):
        _trace(_abstract(**changes), capability)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default device is a GPU")
def test_declines_the_cpu():
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _abstract())
    assert "needs a CUDA device" in triton.unsupported(*arrays)
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        _trace(_abstract(), None)


def test_declines_without_jax_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match="needs the packages `jax-triton` and `triton`"):
        _trace(_abstract(), 80)


def test_importing_it_imports_nothing_heavy():
    assert not {"triton", "jax_triton"} & set(vars(triton))


# Shared memory of one block, bytes.
_SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}


@pytest.mark.skipif(
    _missing("jax_triton") or _missing("jax_cuda13_plugin"),
    reason="compiling for CUDA needs jax-triton and JAX's CUDA plugin",
)
@pytest.mark.parametrize(
    ("dim", "staggered"),
    [(64, False), (96, True), (128, False), (128, True), (256, False), (256, True)],
)
@pytest.mark.parametrize("capability", _SHARED_MEMORY)
def test_compiles_without_a_gpu(capability, dim, staggered, monkeypatch, tmp_path):
    import triton as triton_package
    from jax_triton import triton_lib

    kernels = []
    make = triton_lib.triton_kernel_call_lib.TritonKernel
    monkeypatch.setattr(
        triton_lib.triton_kernel_call_lib, "TritonKernel",
        lambda *args: kernels.append(args) or make(*args),
    )  # fmt: skip
    triton_lib._COMPILED_KERNEL_CACHE.clear()
    _trace(_abstract(dim=dim, staggered=staggered), capability).lower(lowering_platforms=("cuda",))
    [(_, _, _, shared_memory, ptx, *_)] = kernels
    assert shared_memory <= _SHARED_MEMORY[capability]
    (tmp_path / "kernel.ptx").write_text(ptx)
    ptxas = [triton_package.knobs.nvidia.ptxas.path, "-v", "kernel.ptx", "-o", "kernel.cubin"]
    ptxas.append(f"-arch=sm_{capability}" + ("a" if capability == 90 else ""))
    run = subprocess.run(
        ptxas, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    # Serialised wgmma, or more in memory than a few scalars, costs more than any choice of blocks.
    assert "serialized" not in run.stderr
    [spilled] = re.findall(r"(\d+) bytes spill stores", run.stderr)
    assert int(spilled) <= 64, run.stderr


def _plain_attention(q, k, v, mask):
    """What rounding costs ordinary 16-bit attention: float32 only inside the softmax."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[3] ** -0.5, -jnp.inf)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0).astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(_missing("jax_triton"), reason="needs jax-triton")
@pytest.mark.parametrize("case", GPU_CASES, ids=_name)
def test_kernel_on_the_gpu(case: Case):
    q, k, v, index, lengths, q_offset = case.build()
    options = {"lengths": lengths, "q_offset": q_offset}
    padded = poison_padding(k, lengths), poison_padding(v, lengths)
    jax.block_until_ready(_attend(q, *padded, index, **options))
    # The outputs are likely to be given this memory.
    jax.block_until_ready(jnp.full((2**26,), jnp.nan, jnp.float32))
    out, lse = _attend(q, *padded, index, **options)
    want, want_lse = reference.block_sparse_attention(q, k, v, index, **options)
    assert out.dtype == q.dtype
    assert bool(jnp.all(jnp.isfinite(out)))
    mask = index.to_mask(case.q_len, case.kv_len, **options)
    plain = _plain_attention(q, k, v, mask).astype(jnp.float32)
    error = lambda x: float(np.max(np.abs(x - want)))
    assert error(out.astype(jnp.float32)) <= 2.0 * error(plain) + 1e-6
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    bound = 4e-3 if case.dtype == "bfloat16" else 1e-3
    assert rms(out.astype(jnp.float32) - want) <= bound * rms(want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4, rtol=1e-4)
    again = _attend(q, *padded, index, **options)
    assert bool(jnp.all(again[0] == out) & jnp.all(again[1] == lse)), "two runs differ"


@pytest.mark.gpu
@pytest.mark.skipif(_missing("jax_triton"), reason="needs jax-triton")
def test_a_million_tokens_are_addressed_right():
    # 2^32 elements of q and 2^30 of k; sampled query tiles against float64.
    n, heads, group, dim = 2**20, 32, 4, 128
    index = workloads.a_shape_index(1, heads, n, n, sink=100, window=1000)
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, h: jax.random.normal(key, (1, n, h, dim), jnp.bfloat16)
    q, k, v = (draw(x, h) for x, h in zip(keys, (32, 8, 8), strict=True))
    out, lse = _attend(q, k, v, index, lengths=jnp.array([n]), q_offset=jnp.int32(0))
    pick = lambda x, head, at: np.asarray(x[0, at, head].astype(jnp.float32), np.float64)
    for head, tile in ((0, 0), (31, 4099), (31, n // 128 - 1)):
        row = np.arange(tile * 128, (tile + 1) * 128)
        begin, count, origin = (
            int(getattr(index, x)[0, head, tile]) for x in ("begin", "count", "origin")
        )
        starts = origin + np.asarray(index.entries[0, head, begin : begin + count])
        key = np.unique(np.concatenate([np.arange(100), *(s + np.arange(128) for s in starts)]))
        key = key[(key >= 0) & (key <= row[-1])]
        scores = pick(q, head, row) @ pick(k, head // group, key).T / np.sqrt(dim)
        scores = np.where(key[None, :] <= row[:, None], scores, -np.inf)
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        want = weights @ pick(v, head // group, key) / total
        difference = pick(out, head, row) - want
        assert np.sqrt(np.mean(difference**2)) <= 4e-3 * np.sqrt(np.mean(want**2))
        np.testing.assert_allclose(lse[0, head, row], (top + np.log(total))[:, 0], atol=1e-3)
