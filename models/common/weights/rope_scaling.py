"""RoPE settings of Hugging Face configurations and GGUF metadata."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.common.config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from models.common.weights.attributes import Attributes

_HF_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_from_hf(
    attributes: Attributes,
    *,
    head_dim: int,
    max_position: int,
    interleaved: bool = False,
    default_partial: float = 1.0,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Reads `rope_theta` and `rope_scaling`, or the `rope_parameters` that replaced both.

    Args:
        attributes: the configuration; problems are added to it.
        head_dim: width of a head.
        max_position: the context of the configuration, the default for original lengths.
        interleaved: how the architecture pairs dimensions.
        default_partial: the rotating part of a head where nothing is said.
        partial: whether the architecture may rotate only a part of each head.
        aliases: other names of rope types in this architecture.
    """
    scaling, parameters = attributes.take("rope_scaling"), attributes.take("rope_parameters")
    chosen = scaling or parameters or {}
    original = attributes.take("original_max_position_embeddings")
    if not isinstance(chosen, Mapping):
        attributes.refuse(f"`rope_scaling` = {chosen!r}, expected an object")
        chosen = {}
    inner = Attributes(chosen, "`rope_scaling`")
    theta = inner.take("rope_theta") or attributes.take("rope_theta", 10000.0)
    factor = inner.take("partial_rotary_factor")
    outer_factor = attributes.take("partial_rotary_factor", default_partial)
    factor = outer_factor if factor is None else factor
    if not partial and factor != 1.0:
        attributes.refuse(f"`partial_rotary_factor` = {factor!r}, supported: 1.0")
    result = hf_rope_scaling(
        inner, max_position=max_position, original=original, aliases=aliases or {}
    )
    for problem in inner.problems():
        attributes.refuse(f"rope: {problem}")
    return make_rope(
        attributes,
        theta=float(theta),
        rotary_dim=int(head_dim * factor) if partial else head_dim,
        interleaved=interleaved,
        scaling=result,
    )


def make_rope(
    attributes: Attributes,
    *,
    theta: float,
    rotary_dim: int,
    interleaved: bool,
    scaling: RopeScaling | None,
) -> RopeConfig:
    """The rotary embedding; what does not fit together is added to `attributes`."""
    try:
        return RopeConfig(
            theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling
        )
    except ValueError as error:
        attributes.refuse(str(error))
        return RopeConfig(theta=10000.0, rotary_dim=2, interleaved=interleaved, scaling=None)


def hf_rope_scaling(
    values: Attributes,
    *,
    max_position: int,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeScaling | None:
    """The scaling that a `rope_scaling` object describes; problems are added to `values`.

    Args:
        values: the object's entries.
        max_position: the context of the configuration.
        original: `original_max_position_embeddings` given outside the object, which wins.
        aliases: other names of rope types.
    """
    old, new = values.take("type"), values.take("rope_type")
    kind = new or old or "default"
    kind = (aliases or {}).get(kind, kind)
    if kind == "default":
        values.ignore(["original_max_position_embeddings"])
        return None
    if kind not in _HF_TYPES:
        values.refuse(f"`rope_type` = {kind!r}, supported: {', '.join(_HF_TYPES)}")
        return None
    length = original or values.take("original_max_position_embeddings") or max_position
    values.ignore(["original_max_position_embeddings"])
    if kind == "longrope":
        return _longrope(values, max_position, int(length))
    if kind == "yarn" and "factor" not in values:
        factor = max_position / length
    else:
        factor = values.require("factor", float)
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "dynamic":
        return DynamicNTKScaling(factor=factor, original_max_position=max_position)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=values.require("low_freq_factor", float),
            high_freq_factor=values.require("high_freq_factor", float, 4.0),
            original_max_position=int(length),
        )
    return _yarn(values, factor, int(length))


def _yarn(values: Attributes, factor: float, length: int) -> YarnScaling:
    attention = values.take("attention_factor")
    mscale, mscale_all = values.take("mscale"), values.take("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        attention = yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all)
    return YarnScaling(
        factor=factor,
        original_max_position=length,
        beta_fast=float(values.take("beta_fast", 32.0)),
        beta_slow=float(values.take("beta_slow", 1.0)),
        attention_factor=float(yarn_temperature(factor) if attention is None else attention),
        truncate=bool(values.take("truncate", True)),
    )


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's recommended factor on cosines and sines (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(values: Attributes, max_position: int, length: int) -> LongRopeScaling | None:
    factor = float(values.take("factor", max_position / length))
    attention = values.take("attention_factor")
    if attention is None:
        attention = longrope_temperature(factor, length)
    short, long = values.take("short_factor"), values.take("long_factor")
    if short is None or long is None:
        values.refuse("`short_factor` and `long_factor` must both be there for longrope")
        return None
    return LongRopeScaling(
        short_factor=tuple(map(float, short)),
        long_factor=tuple(map(float, long)),
        original_max_position=length,
        attention_factor=float(attention),
    )


def longrope_temperature(factor: float, original_length: int) -> float:
    """LongRoPE's factor on cosines and sines (arXiv 2402.13753)."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_length))


def gguf_rope_scaling(
    attributes: Attributes,
    *,
    prefix: str,
    max_position: int,
    frequency_divisors: Sequence[float] | None,
    long_divisors: Sequence[float] | None,
) -> RopeScaling | None:
    """The scaling that GGUF metadata describes, as llama.cpp applies it.

    Args:
        attributes: the metadata; problems are added to it.
        prefix: `{architecture}.rope.scaling`.
        max_position: the context of the metadata.
        frequency_divisors: the tensor `rope_freqs` (Llama 3.1) or `rope_factors_short` (Phi-3).
        long_divisors: the tensor `rope_factors_long`.
    """
    kind = attributes.take(f"{prefix}.type", "none")
    factor = float(attributes.take(f"{prefix}.factor", 0.0))
    length = int(attributes.take(f"{prefix}.original_context_length", max_position))
    attention = float(attributes.take(f"{prefix}.attn_factor", 1.0))
    attributes.ignore([f"{prefix}.finetuned"])
    yarn = {
        name: attributes.take(f"{prefix}.yarn_{name}", default)
        for name, default in (
            ("ext_factor", 1.0),
            ("attn_factor", 1.0),
            ("beta_fast", 32.0),
            ("beta_slow", 1.0),
        )
    }
    if frequency_divisors is not None:
        if kind not in ("none", "longrope"):
            attributes.refuse(f"`{prefix}.type` = {kind!r} together with frequency factors")
        short = tuple(map(float, frequency_divisors))
        long = short if long_divisors is None else tuple(map(float, long_divisors))
        return LongRopeScaling(
            short_factor=short,
            long_factor=long,
            original_max_position=length,
            attention_factor=attention,
        )
    if attention != 1.0 and kind != "yarn":
        attributes.refuse(f"`{prefix}.attn_factor` = {attention!r} without yarn or longrope")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(factor=factor) if factor > 1 else None
    if kind == "yarn":
        if yarn["ext_factor"] != 1.0:
            attributes.refuse(
                f"`{prefix}.yarn_ext_factor` = {yarn['ext_factor']!r}, supported: 1.0"
            )
        return YarnScaling(
            factor=factor or 1.0,
            original_max_position=length,
            beta_fast=float(yarn["beta_fast"]),
            beta_slow=float(yarn["beta_slow"]),
            attention_factor=attention * yarn["attn_factor"] * yarn_temperature(factor),
            truncate=True,
        )
    attributes.refuse(f"`{prefix}.type` = {kind!r}, supported: none, linear, yarn, longrope")
    return None


def scaling_from_mapping(values: Mapping[str, Any], *, max_position: int) -> RopeScaling | None:
    """The scaling of a `rope_scaling` object as `config.json` writes it.

    Raises:
        LoadError: an entry is missing, unknown or unsupported.
    """
    attributes = Attributes(values, "`rope_scaling`")
    scaling = hf_rope_scaling(attributes, max_position=max_position)
    attributes.finish()
    return scaling
