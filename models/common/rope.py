"""Rotary position embedding: frequencies of every scaling, rotation tables, and the rotation.

A pair of coordinates with frequency f is turned by the angle `position * f`. In fp32 that product
loses a sixteenth of a radian at a position of one million, so frequencies are kept in fixed point,
as turns per token in units of 2^-32 turn: a wrapping 32-bit multiplication then drops the whole
turns exactly, and angles are right to 1e-6 radian at any position below 2^31.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from models.common.config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

_UNITS_PER_TURN = 2.0**32


class Frequencies(NamedTuple):
    """Turns per token of every rotated pair, in units of 2^-32 turn: `steps + rest`."""

    steps: UInt32[Array, "batch half"]
    rest: Float[Array, "batch half"]  # in [-1/2, 1/2]


def frequencies(rope: RopeConfig, rope_length: Int[Array, " batch"]) -> Frequencies:
    """Computes the frequencies of each row.

    Args:
        rope: the embedding's hyper-parameters.
        rope_length: the length each row will have when it is finished. LongRoPE takes its long
            divisors for rows longer than the original length, and dynamic NTK grows the base with
            it; the other kinds do not read it. One length for a row's whole life keeps cached keys
            consistent.
    """
    batch, half = rope_length.shape[0], rope.rotary_dim // 2
    plain = _plain(rope)
    scaling = rope.scaling
    if isinstance(scaling, DynamicNTKScaling):
        # base' = base * growth^(d / (d - 2)), so frequency' = frequency * growth^(-2i / (d - 2)).
        original = scaling.original_max_position
        length = jnp.maximum(rope_length, original).astype(jnp.float32)
        growth = scaling.factor * length / original - (scaling.factor - 1.0)
        exponent = -np.arange(0, rope.rotary_dim, 2) / (rope.rotary_dim - 2)
        stretch = growth[:, None] ** jnp.asarray(exponent, jnp.float32)[None, :]
        return _to_fixed_point(
            stretch * jnp.asarray(_units(plain), jnp.float32)[None, :]  # below 2^30
        )
    if isinstance(scaling, LongRopeScaling):
        short = _constant_fixed_point(plain / np.asarray(scaling.short_factor))
        long = _constant_fixed_point(plain / np.asarray(scaling.long_factor))
        is_long = (rope_length > scaling.original_max_position)[:, None]
        return jax.tree.map(lambda a, b: jnp.where(is_long, a[None, :], b[None, :]), long, short)
    constant = _constant_fixed_point(_scaled(plain, rope, scaling))
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None, :], (batch, half)), constant)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Returns what multiplies cosines and sines (YaRN section 3.4, LongRoPE)."""
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        return scaling.attention_factor
    return 1.0


def rotation_tables(
    rope: RopeConfig, positions: Int[Array, "batch s"], rope_length: Int[Array, " batch"]
) -> tuple[Float[Array, "batch s half"], Float[Array, "batch s half"]]:
    """Computes cosines and sines of every token's angles, fp32, times the attention factor.

    Args:
        rope: the embedding's hyper-parameters.
        positions: position of each token in its row, from 0.
        rope_length: see `frequencies`.
    """
    steps, rest = frequencies(rope, rope_length)
    position = positions[:, :, None]
    wrapped = position.astype(jnp.uint32) * steps[:, None, :]
    signed = jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32)
    units = signed + position.astype(jnp.float32) * rest[:, None, :]
    angles = units * (2.0 * math.pi / _UNITS_PER_TURN)
    factor = attention_factor(rope.scaling)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "batch s heads head_dim"],
    cos: Float[Array, "batch s half"],
    sin: Float[Array, "batch s half"],
    *,
    interleaved: bool,
) -> Float[Array, "batch s heads head_dim"]:
    """Rotates the first `2 * half` coordinates of each head, in fp32, and keeps the rest.

    Args:
        x: queries or keys.
        cos: cosines from `rotation_tables`.
        sin: sines from `rotation_tables`.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + half).

    Returns:
        The rotated heads, in x's dtype.
    """
    half = cos.shape[-1]
    kept = x[..., 2 * half :]
    pair_shape = (half, 2) if interleaved else (2, half)
    pairs = x[..., : 2 * half].reshape(*x.shape[:-1], *pair_shape).astype(jnp.float32)
    axis = -1 if interleaved else -2
    first, second = (jnp.take(pairs, i, axis=axis) for i in (0, 1))
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    turned = turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype)
    return jnp.concatenate([turned, kept], axis=-1)


def _plain(rope: RopeConfig) -> np.ndarray:
    """Radians per token without scaling, float64 `[half]`."""
    return rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)


def _scaled(plain: np.ndarray, rope: RopeConfig, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token under a scaling that does not depend on the row."""
    match scaling:
        case None:
            return plain
        case LinearScaling():
            return plain / scaling.factor
        case Llama3Scaling():
            return _llama3(plain, scaling)
        case YarnScaling():
            return _yarn(plain, rope, scaling)
        case _:
            raise TypeError(f"`scaling` must be a RopeScaling, got {type(scaling).__name__}")


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns_in_context = scaling.original_max_position * plain / (2 * math.pi)
    kept = (turns_in_context - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: np.ndarray, rope: RopeConfig, scaling: YarnScaling) -> np.ndarray:
    """NTK-by-parts (YaRN section 3.2), with the ramp over dimensions of the published code."""

    def dimension_with(turns: float) -> float:
        context = scaling.original_max_position
        return (
            rope.rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _units(radians: np.ndarray) -> np.ndarray:
    return radians / (2 * math.pi) * _UNITS_PER_TURN


def _constant_fixed_point(radians: np.ndarray) -> Frequencies:
    units = _units(radians)
    steps = np.round(units)
    # Whole turns per token do nothing, so the remainder of 2^32 is enough (frequencies above 2 pi).
    return Frequencies(
        steps=jnp.asarray(np.mod(steps, _UNITS_PER_TURN).astype(np.uint32)),
        rest=jnp.asarray(units - steps, jnp.float32),
    )


def _to_fixed_point(units: Float[Array, "batch half"]) -> Frequencies:
    steps = jnp.round(units)
    return Frequencies(steps=steps.astype(jnp.uint32), rest=units - steps)
