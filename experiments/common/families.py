"""Families of methods: which numbers follow the name, and what attention they make."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import minference_jax as mj
from experiments.common.errors import UserError
from pallas_kernels.block_sparse_attention.api import Implementation


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of methods.

    Attributes:
        numbers: names of the numbers (or words) after the colon, and what reads each.
        make: from these numbers to what every head gets; raises ValueError.
        attention: from that, layers and heads to the attention of a model.
        required: how many of the numbers must be given.
        whole: whether a prompt must be read whole, not in chunks.
    """

    numbers: dict[str, type]
    make: Callable[..., Any]
    attention: Callable[[Any, int, int], Any]
    required: int
    whole: bool = False

    def usage(self, name: str) -> str:
        """How such a method is written; brackets around what may be left out."""
        names = [word.upper() for word in self.numbers]
        must, may = names[: self.required], names[self.required :]
        if not must:
            return name + "".join(f"[:{word}]" for word in may)
        return (f"{name}:" if names else name) + ",".join(must) + "".join(f"[,{x}]" for x in may)


def _dense(kernel: Any = None) -> mj.DenseAttention:
    known = get_args(Implementation)
    if kernel not in (None, *known):
        raise ValueError(f"kernel must be one of {', '.join(known)}, got {kernel!r}")
    return mj.DenseAttention(implementation=kernel)


def _uniform(pattern: mj.Pattern, layers: int, heads: int) -> mj.SparseAttention:
    patterns = mj.HeadPatterns.uniform(pattern, num_layers=layers, num_heads=heads)
    # A budget that was named is what runs, at any length.
    return mj.SparseAttention(patterns, break_even=0)


def _adaptive(estimator: mj.Estimator, layers: int, heads: int) -> mj.AdaptiveAttention:
    return mj.AdaptiveAttention(estimator, break_even=0).for_layers(layers)


def _threshold(alpha: float, pooled_rows: int = 16) -> mj.BlockThreshold:
    _check_divides("pooled_rows", pooled_rows)
    return mj.BlockThreshold(alpha, pooled_rows=pooled_rows)


def _block_mass(mass: float, num_columns: int = 0, rows: int = 128) -> mj.Estimator:
    _check_divides("rows", rows)
    blocks = mj.BlockMass(mass, rows=rows)
    return mj.WithColumns(blocks, num_columns) if num_columns else blocks


def _hybrid(alpha: float, num_columns: int, pooled_rows: int = 16) -> mj.Estimator:
    return mj.WithColumns(_threshold(alpha, pooled_rows), num_columns)


def _diagonals(num_diagonals: int, num_columns: int = 0) -> mj.Estimator:
    diagonals = mj.BlockDiagonals(num_diagonals)
    return mj.WithColumns(diagonals, num_columns) if num_columns else diagonals


def _x_attention(tau: float, stride: int = 16) -> mj.Estimator:
    _check_divides("stride", stride)
    return mj.XAttention(tau, stride)


def _check_divides(name: str, value: int) -> None:
    block = mj.Layout().block_q
    if value < 1 or block % value:
        raise ValueError(f"{name} must divide {block}, got {value}")


def _inf_llm(n_local: int, topk: int = 16, exc_block: int = 512) -> mj.InfLLM:
    made = mj.InfLLM(n_local=n_local, topk=topk, exc_block=exc_block)
    block = mj.Layout().block_kv
    for name in ("n_local", "exc_block"):
        if (value := getattr(made, name)) % block:
            raise ValueError(f"{name} must be a multiple of {block}, got {value}")
    return made


def _shared(estimator: mj.Estimator, layers: int, heads: int) -> mj.AdaptiveAttention:
    """One choice for each KV head, as it was published."""
    layout = mj.Layout(shared=True)
    return mj.AdaptiveAttention(estimator, layout, break_even=0).for_layers(layers)


def _dilated(global_size: int, window_size: int) -> mj.DilatedStreaming:
    _check_window("window_size", window_size, stride=2)
    return mj.streaming_dilated(global_size, window_size)


def _strided(global_size: int, local_size: int, window_size: int) -> mj.DilatedStreaming:
    _check_window("local_size", local_size, stride=1)
    _check_window("window_size", window_size, stride=2)
    return mj.streaming_strided(global_size, local_size, window_size)


def _check_window(name: str, size: int, *, stride: int) -> None:
    """Shorter ones would fail, but only once a prompt is longer."""
    least = (128 + 128 - 1) * stride  # of the keys that are left: a query tile and a key tile
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")


def _of_any_model(attention: Any, layers: int, heads: int) -> Any:
    return attention


def _triangle(first_triangle: int, **sizes: int) -> tuple[int, mj.TriShape]:
    if first_triangle < 0:
        raise ValueError(f"first_triangle must be at least 0, got {first_triangle}")
    return first_triangle, mj.TriShape(**sizes)


def _mixed(made: tuple[int, mj.TriShape], layers: int, heads: int) -> mj.SparseAttention:
    first, sizes = made
    if first > layers:
        raise UserError(
            f"triangle_mix begins with layer {first}, but the model has {layers}; take less"
        )
    patterns = mj.triangle_mix(
        num_layers=layers, num_heads=heads, first_triangle=first, **dataclasses.asdict(sizes)
    )
    return mj.SparseAttention(patterns, break_even=0)


_WINDOW: dict[str, type] = {"sink_size": int, "window_size": int}
_TRIANGLE: dict[str, type] = {**_WINDOW, "last_size": int}
_LINES: dict[str, type] = {"vertical_size": int, "slash_size": int}

FAMILIES: dict[str, Family] = {
    # Another kernel's dense attention tells what rounding alone does.
    "dense": Family({"kernel": str}, _dense, _of_any_model, 0),
    "minference": Family(
        {}, lambda: None, lambda made, layers, heads: mj.recommended_attention(layers), 0
    ),
    "a_shape": Family(_WINDOW, mj.AShape, _uniform, 2),
    "tri_shape": Family(_TRIANGLE, mj.TriShape, _uniform, 3),
    "vertical_slash": Family({**_LINES, **_WINDOW}, mj.VerticalSlash, _uniform, 2),
    "block_sparse": Family({"num_blocks": int}, mj.BlockSparse, _uniform, 1),
    "triangle_mix": Family({"first_triangle": int, **_TRIANGLE}, _triangle, _mixed, 4),
    "threshold": Family({"alpha": float, "pooled_rows": int}, _threshold, _adaptive, 1),
    "hybrid": Family(
        {"alpha": float, "num_columns": int, "pooled_rows": int}, _hybrid, _adaptive, 2
    ),
    "block_mass": Family(
        {"mass": float, "num_columns": int, "rows": int}, _block_mass, _adaptive, 1
    ),
    "xattention": Family({"tau": float, "stride": int}, _x_attention, _adaptive, 1),
    "flexprefill": Family(
        {"gamma": float, "tau": float, "min_budget": int}, mj.FlexPrefill, _adaptive, 1
    ),
    "diagonals": Family({"num_diagonals": int, "num_columns": int}, _diagonals, _adaptive, 1),
    "inf_llm": Family(
        {"n_local": int, "topk": int, "exc_block": int}, _inf_llm, _shared, 1, whole=True
    ),
    "streaming_dilated": Family(
        {"global_size": int, "window_size": int}, _dilated, _of_any_model, 2
    ),
    "streaming_strided": Family(
        {"global_size": int, "local_size": int, "window_size": int}, _strided, _of_any_model, 3
    ),
    "top_k": Family({"k": int}, mj.TopKAttention, _of_any_model, 1),
}
