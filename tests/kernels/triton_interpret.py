"""Runs the Triton kernel on the CPU: `TRITON_INTERPRET=1 python -m tests.kernels.triton_interpret`.

Triton's interpreter executes every program in numpy. It takes torch tensors of its own accord; here
it is handed addresses of numpy arrays instead. It multiplies float16 right but not bfloat16.
Prints one line for each case and exits with 1 if one is wrong.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import triton as triton_package
from triton.runtime import interpreter

from pallas_kernels.block_sparse_attention import reference, triton
from pallas_kernels.block_sparse_attention.triton_kernel import attention_kernel
from tests.kernels.triton_cases import INTERPRETED_CASES, SMALL_BLOCK_CASES, poison_padding

# Float16 weights and outputs, values of order one.
_TOLERANCE = 2e-3


class _Pointer:
    """What the interpreter asks of a tensor."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = {"float16": "fp16", "float32": "fp32", "int32": "i32"}[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


def call(*args, out, kernel, grid, **options):
    """Stands in for `jax_triton.triton_call`; outputs begin as NaN."""
    constants = {k: v for k, v in options.items() if k.isupper()}
    scalars = {i: x for i, x in enumerate(args) if isinstance(x, int)}

    def run(*arrays):
        inputs = [_Pointer(np.ascontiguousarray(x)) for x in arrays]
        for place, value in scalars.items():
            inputs.insert(place, value)
        outputs = [_Pointer(np.full(x.shape, np.nan, x.dtype)) for x in out]
        kernel[grid](*inputs, *outputs, **constants)
        return tuple(x.array for x in outputs)

    arrays = [x for x in args if not isinstance(x, int)]
    return jax.pure_callback(run, out, *arrays)


def _patch_tensor(tensor, scope, stock=interpreter._patch_lang_tensor):
    """numpy 2.4 and later no longer turn an array of one element into a number."""
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch():
    """Points the interpreter at numpy arrays and the implementation at the interpreter."""
    assert triton_package.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda self, *args: None
    interpreter._patch_lang_tensor = _patch_tensor
    triton._import_triton = lambda: (call, attention_kernel)


def errors(case, config) -> tuple[float, float]:
    """Largest differences from the definition: outputs, log-sum-exp."""
    q, k, v, index, lengths, q_offset = case.build()
    q, k, v = (x.astype(jnp.float16) for x in (q, k, v))
    options = {"lengths": lengths, "q_offset": q_offset}
    want, want_lse = jax.jit(reference.block_sparse_attention)(q, k, v, index, **options)
    k, v = poison_padding(k, lengths), poison_padding(v, lengths)
    attend = functools.partial(triton.block_sparse_attention, compute_capability=80, config=config)
    got, lse = jax.jit(attend)(q, k, v, index, **options)
    # In numpy, whose maximum is NaN where a difference is; XLA's on a CPU may not be.
    got, want, lse, want_lse = (np.asarray(x, np.float32) for x in (got, want, lse, want_lse))
    with np.errstate(invalid="ignore"):
        lse_difference = np.where(lse == want_lse, 0.0, np.abs(lse - want_lse))
    return float(np.max(np.abs(got - want))), float(np.max(lse_difference))


def main() -> int:
    """Compares every case with the definition."""
    patch()
    wrong = 0
    small = triton.Config(block_m=32, block_n=32, num_warps=4, num_stages=2)
    runs = [*((x, None) for x in INTERPRETED_CASES), *((x, small) for x in SMALL_BLOCK_CASES)]
    for case, config in runs:
        error, lse_error = errors(case, config)
        good = error <= _TOLERANCE and lse_error <= 1e-4
        wrong += not good
        name = case.name if config is None else f"{case.name}, small blocks"
        print(f"{'ok' if good else 'WRONG'} {name} {error:.1e} {lse_error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
