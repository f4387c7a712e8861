"""Thresholds of every head of a model as versioned JSON, and back."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from minference_jax.adaptive.attention import AdaptiveAttention
from minference_jax.adaptive.block_threshold import BlockThreshold
from minference_jax.adaptive.layout import Layout
from minference_jax.adaptive.with_columns import WithColumns

FORMAT = "minference_jax.adaptive"
VERSION = 1

# Parameters of each estimator: whether they are whole numbers, and the largest.
_THRESHOLD: dict[str, tuple[bool, int | float]] = {
    "alpha": (False, 1.0),
    "local_blocks": (True, 2**30),
}
_PARAMETERS = {"threshold": _THRESHOLD, "hybrid": {**_THRESHOLD, "num_columns": (True, 2**30)}}
# Whole numbers that are one for the whole model.
_STATIC = ("sink_blocks", "pooled_rows", "parts")
_OTHERS = ("format", "version", "estimator", *_STATIC, "layout", "dense_above")


def to_content(attention: AdaptiveAttention) -> dict[str, Any]:
    """The parameters of an attention as what JSON can hold; `from_content` reads them.

    Parameters that are the same everywhere are written as one number, but for `alpha`, whose rows
    say how many layers and heads there are. Which kernel runs, and from which length on anything is
    estimated, is not part of it.

    Raises:
        ValueError: another estimator than `BlockThreshold`, alone or in `WithColumns`; or `alpha`
            is not [layers, heads].
    """
    estimator = attention.estimator
    blocks = estimator.blocks if isinstance(estimator, WithColumns) else estimator
    if not isinstance(blocks, BlockThreshold):
        raise ValueError(
            "files hold BlockThreshold and WithColumns(BlockThreshold), got "
            f"{type(estimator).__name__} of {type(blocks).__name__}"
        )
    values = {name: getattr(blocks, name) for name in _THRESHOLD}
    if isinstance(estimator, WithColumns):
        values["num_columns"] = estimator.num_columns
    if np.ndim(values["alpha"]) != 2:
        raise ValueError(
            f"`alpha` must be [layers, heads] to be written, got shape {np.shape(values['alpha'])}"
        )
    shape = np.shape(values["alpha"])
    rows = {name: np.broadcast_to(np.asarray(x), shape) for name, x in values.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "estimator": "hybrid" if isinstance(estimator, WithColumns) else "threshold",
        **{name: getattr(blocks, name) for name in _STATIC},
        "layout": dataclasses.asdict(attention.layout),
        "dense_above": attention.dense_above,
        **{
            name: _plain(x[0, 0]) if name != "alpha" and np.all(x == x[0, 0]) else
            [[_plain(value) for value in row] for row in x]
            for name, x in rows.items()
        },
    }  # fmt: skip


def _plain(value: Any) -> int | float:
    # The shortest digits of a float32, which say the same float32 again.
    return int(value) if np.issubdtype(np.asarray(value).dtype, np.integer) else float(str(value))


def from_content(content: dict[str, Any]) -> AdaptiveAttention:
    """The attention of a model that `to_content` wrote; every parameter is [layers, heads].

    Raises:
        ValueError: it is of another version, or something in it is not as `to_content` writes it;
            names the layer and the head.
    """
    if content.get("version") != VERSION:
        raise ValueError(
            f"version {content.get('version')!r} of the adaptive format; expected {VERSION}"
        )
    parameters = _PARAMETERS.get(content.get("estimator", ""))
    if parameters is None:
        raise ValueError(
            f"unknown estimator {content.get('estimator')!r}; expected {' or '.join(_PARAMETERS)}"
        )
    wanted = {*_OTHERS, *parameters}
    if content.keys() != wanted:
        raise ValueError(f"expected the keys {sorted(wanted)}, got {sorted(content)}")
    shape = _shape(content["alpha"])
    values = {
        name: _array(content[name], name, shape, *limits) for name, limits in parameters.items()
    }
    columns = values.pop("num_columns", None)
    for name in _STATIC:
        if type(content[name]) is not int:
            raise ValueError(f"`{name}` must be a whole number, got {content[name]!r}")
    estimator: Any = BlockThreshold(**values, **{name: content[name] for name in _STATIC})
    if columns is not None:
        most = max(int(columns.max()), 1)
        capacity = 1 << (most - 1).bit_length()
        estimator = WithColumns(estimator, columns, max_columns=capacity)
    layout = Layout(**content["layout"])
    return AdaptiveAttention(estimator, layout=layout, dense_above=content["dense_above"])


def _shape(rows: Any) -> tuple[int, int]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(
            "`alpha` must be a list of layers, each a list with a number for each head"
        )
    heads = len(rows[0])
    for layer, row in enumerate(rows):
        if len(row) != heads or not heads:
            raise ValueError(
                f"layer {layer}: `alpha` has {len(row)} heads, expected {heads or 'some'}"
            )
    return len(rows), heads


def _array(rows: Any, name: str, shape: tuple[int, int], whole: bool, most: int | float) -> Any:
    if not isinstance(rows, list):
        rows = [[rows] * shape[1]] * shape[0]
    if [len(row) for row in rows] != [shape[1]] * shape[0]:
        raise ValueError(f"`{name}` must be one number, or rows as those of `alpha`, {shape}")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            kinds = (int,) if whole else (int, float)
            good = isinstance(value, kinds) and not isinstance(value, bool)
            if not good or not math.isfinite(value) or not 0 <= value <= most:
                kind = "a whole number" if whole else "a number"
                raise ValueError(
                    f"layer {layer}, head {head}: `{name}` must be {kind} within 0..{most}, got "
                    f"{value!r}"
                )
    return jnp.asarray(rows, jnp.int32 if whole else jnp.float32)
