"""Dense attention by others, timed in the same run on the same inputs."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# XLA's own dense attention on a CPU holds heads * length^2 scores; beyond this it is left out.
_MAX_CPU_LENGTH = 8192


def timed(call: Callable[[], Any], *, repeats: int) -> list[float]:
    """Seconds of each call, warm; calls that take over a second are repeated once only."""
    jax.block_until_ready(call())
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < max(1.0, 0.2 * repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def jax_dense(q: Array, k: Array, v: Array, *, repeats: int) -> dict[str, Any]:
    """`jax.nn.dot_product_attention`: cuDNN on a GPU, XLA on a CPU."""
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and q.shape[1] > _MAX_CPU_LENGTH:
        return {"skipped": f"holds every score; left out beyond {_MAX_CPU_LENGTH} tokens"}
    implementation = "cudnn" if on_gpu else "xla"
    if on_gpu and q.dtype == jnp.float32:
        return {"skipped": "cuDNN's fused attention takes bfloat16 and float16 only"}

    @jax.jit
    def run(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return {"seconds": timed(lambda: run(q, k, v), repeats=repeats)}


def torch_flash(q: Array, k: Array, v: Array, *, repeats: int) -> dict[str, Any]:
    """FlashAttention-2 through torch's scaled_dot_product_attention, where torch sees a GPU."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {"skipped": "torch is not installed"}
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        return {"skipped": "torch sees no GPU"}
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(q.dtype.name)
    if dtype is None:
        return {"skipped": "FlashAttention-2 takes bfloat16 and float16 only"}
    # Fresh random arrays of the same shapes: dense attention's time does not depend on values.
    shapes = [np.asarray(x.shape)[[0, 2, 1, 3]].tolist() for x in (q, k, v)]
    arrays = [torch.randn(*shape, dtype=dtype, device="cuda") for shape in shapes]

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(
                *arrays, is_causal=True, enable_gqa=True
            )
        torch.cuda.synchronize()

    seconds = timed(run, repeats=repeats)
    del arrays
    torch.cuda.empty_cache()
    return {"seconds": seconds, "torch": torch.__version__}


def tokamax_dense(q: Array, k: Array, v: Array, *, repeats: int) -> dict[str, Any]:
    """Tokamax's Mosaic GPU kernel, where it is installed."""
    try:
        import tokamax
    except ImportError:
        return {"skipped": "tokamax is not installed"}
    if jax.default_backend() != "gpu":
        return {"skipped": "tokamax's Mosaic kernel needs a GPU"}
    run = jax.jit(
        lambda q, k, v: tokamax.dot_product_attention(
            q, k, v, is_causal=True, implementation="mosaic"
        )
    )
    return {"seconds": timed(lambda: run(q, k, v), repeats=repeats)}
