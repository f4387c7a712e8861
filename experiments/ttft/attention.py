"""Attention callables of this experiment: cuDNN's dense one, and one that costs nothing."""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int

import minference_jax as mj
from experiments.common.errors import UserError
from experiments.common.methods import Method, parse_methods
from minference_jax.pairs import Executed
from pallas_kernels import BlockSparseIndex

CUDNN = "cudnn"


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """Dense causal attention of whole prompts by cuDNN, through JAX: an AttentionFn."""

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """The output; raises ValueError for chunks of a prompt. Padding is at the end, unseen."""
        if q_offset is not None or q.shape[1] != k.shape[1]:
            raise ValueError("cuDNN's attention reads whole prompts only; leave out chunks")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def mix(
    q: Float[Array, "batch s heads head_dim"],
    k: Float[Array, "batch s kv_heads head_dim"],
    v: Float[Array, "batch s kv_heads head_dim"],
) -> Float[Array, "batch s heads head_dim"]:
    """In place of attention, where the rest of a layer is timed: reads all, computes nothing.

    Of queries alone the compiler would drop the projections of keys and values.
    """
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    return (groups + (k + v)[:, :, :, None]).reshape(q.shape)


def observe_executed(attention, q, k, v, **where):
    """The `observe` of a prefill that keeps `Executed`, None of attention without an index."""
    if isinstance(attention, mj.ShardedAttention):
        return attention.attend_executed(q, k, v, **where)
    attend = getattr(attention, "attend", None)
    if attend is None:
        return attention(q, k, v, **where), None
    out, index = attend(q, k, v, **where)
    return out, Executed.of(index) if isinstance(index, BlockSparseIndex) else None


def read_methods(specs: tuple[str, ...], *, chunked: bool) -> list[Method]:
    """Returns the methods named; beside the known ones `cudnn`, where there is a GPU.

    Raises:
        UserError: one is none, keeps a part of the cache, takes lines of another prompt, or cannot
            read chunks but should.
    """
    if CUDNN in specs and jax.default_backend() != "gpu":
        raise UserError("--methods: cudnn needs a CUDA device; take dense, this project's own")
    others = tuple(spec for spec in specs if spec != CUDNN)
    known = {method.label: method for method in (parse_methods(others) if others else [])}
    cudnn = Method(
        family=CUDNN, label=CUDNN, attention=lambda layers, heads: CudnnAttention(), whole=True
    )
    methods = [cudnn] * (CUDNN in specs) + list(known.values())
    for method in methods:
        if method.kept is not None:
            raise UserError(f"--methods: --kv-cache says what is kept; shorten {method.label}")
        if method.calibrated is not None:
            raise UserError(
                f"--methods: {method.label} needs lines of another prompt; leave it out"
            )
        if chunked and method.whole:
            raise UserError(f"{method.label} reads whole prompts; leave out --chunk-size")
    return methods
