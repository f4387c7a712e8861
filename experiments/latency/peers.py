"""Dense attention by others, timed in the same run on the same shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.common.timing import Programs, Shaped, time_calls

# XLA's own dense attention on a CPU holds heads * length^2 scores; beyond this it is left out.
_MAX_CPU_LENGTH = 8192
# Peers other than JAX's own are a second opinion: not timed where a call takes seconds.
_MAX_OTHER_LENGTH = 131072

# Seconds of each call under "seconds", or under "skipped" why there are none.
Times = dict[str, Any]


def jax_dense_name() -> str:
    """What runs `jax.nn.dot_product_attention` here: cuDNN on a GPU, XLA on a CPU."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def add_jax_dense(programs: Programs, q: Shaped, k: Shaped, v: Shaped) -> str | None:
    """Adds `jax.nn.dot_product_attention`; returns why it cannot run, None if it can."""
    name = jax_dense_name()
    if name == "xla" and q.shape[1] > _MAX_CPU_LENGTH:
        return f"holds every score; left out beyond {_MAX_CPU_LENGTH} tokens"
    if name == "cudnn" and q.dtype == jnp.float32:
        return "cuDNN's fused attention takes bfloat16 and float16 only"
    run = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)
    programs.add(name, run, q, k, v)
    return None


def other_peers(q: Array, k: Array, v: Array) -> dict[str, Times]:
    """Times torch's FlashAttention-2 and tokamax's Mosaic kernel, where they are installed."""
    if q.shape[1] > _MAX_OTHER_LENGTH:
        reason = {"skipped": f"left out beyond {_MAX_OTHER_LENGTH} tokens"}
        return {"torch-fa2": reason, "tokamax": reason}
    return {"torch-fa2": _torch_flash(q, k, v), "tokamax": _tokamax(q, k, v)}


def _torch_flash(q: Array, k: Array, v: Array) -> Times:
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

    seconds = time_calls(run, wait=lambda _: torch.cuda.synchronize())
    del arrays
    torch.cuda.empty_cache()
    return {"seconds": seconds, "version": torch.__version__}


def _tokamax(q: Array, k: Array, v: Array) -> Times:
    try:
        import tokamax
    except ImportError:
        return {"skipped": "tokamax is not installed"}
    if jax.default_backend() != "gpu":
        return {"skipped": "tokamax's Mosaic kernel needs a GPU"}
    run = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic")
    try:
        compiled = jax.jit(run).lower(q, k, v).compile()
    except Exception as error:  # a peer that cannot serve must not end the run
        return {"skipped": f"does not compile: {type(error).__name__}: {str(error)[:200]}"}
    return {"seconds": time_calls(compiled, q, k, v)}
