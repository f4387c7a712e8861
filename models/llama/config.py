"""Shapes of the published models of the Llama family, for benchmarks and shape-only work.

`load_model` reads a checkpoint's own configuration and never these.
"""

import math
from typing import Literal

from models.common.config import (
    DecoderConfig,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
)


def llama3_8b() -> DecoderConfig:
    """Llama 3 8B: context 8K."""
    return _llama3_8b(theta=500_000.0, max_position=8192, scaling=None)


def llama3_8b_gradient_262k() -> DecoderConfig:
    """Llama-3-8B-Instruct-262k (Gradient): Llama 3 with a larger rotary base."""
    return _llama3_8b(theta=283_461_213.0, max_position=262_144, scaling=None)


def llama3_8b_gradient_1048k() -> DecoderConfig:
    """Llama-3-8B-Instruct-Gradient-1048k: the paper's main model."""
    return _llama3_8b(theta=3_580_165_449.0, max_position=1_048_576, scaling=None)


def llama3_1_8b() -> DecoderConfig:
    """Llama 3.1 8B: context 128K by Llama 3 frequency scaling."""
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    return _llama3_8b(theta=500_000.0, max_position=131_072, scaling=scaling)


def yi_9b_200k() -> DecoderConfig:
    """Yi-9B-200K: 48 narrow layers, 4 key/value heads."""
    return DecoderConfig(
        vocab_size=64_000,
        embed_dim=4096,
        hidden_dim=11_008,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        max_position=262_144,
        norm_eps=1e-5,
        rope=_rope(10_000_000.0, 128),
    )


def mistral_7b() -> DecoderConfig:
    """Mistral 7B v0.2: context 32K, no sliding window."""
    return DecoderConfig(
        vocab_size=32_000,
        embed_dim=4096,
        hidden_dim=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=32_768,
        norm_eps=1e-5,
        rope=_rope(1_000_000.0, 128),
    )


def smollm2_135m() -> DecoderConfig:
    """SmolLM2-135M: 30 narrow layers, tied embeddings; runs on a laptop."""
    return DecoderConfig(
        vocab_size=49_152,
        embed_dim=576,
        hidden_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=8192,
        norm_eps=1e-5,
        rope=_rope(100_000.0, 64),
        tie_embeddings=True,
    )


def phi3_mini_128k(
    *, short_factor: tuple[float, ...], long_factor: tuple[float, ...]
) -> DecoderConfig:
    """Phi-3-mini-128k: multi-head attention with head_dim 96, context 128K by LongRoPE from 4K.

    Args:
        short_factor: 48 divisors of the frequencies up to 4096 tokens, from the checkpoint's
            `config.json`; releases differ in them.
        long_factor: the same, for longer sequences.
    """
    original, context = 4096, 131_072
    scaling = LongRopeScaling(
        short_factor=short_factor,
        long_factor=long_factor,
        original_max_position=original,
        attention_factor=math.sqrt(1 + math.log(context / original) / math.log(original)),
    )
    return DecoderConfig(
        vocab_size=32_064,
        embed_dim=3072,
        hidden_dim=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        max_position=context,
        norm_eps=1e-5,
        rope=_rope(10_000.0, 96, scaling),
    )


def qwen2_7b() -> DecoderConfig:
    """Qwen2-7B: biases on q, k and v."""
    return _qwen2((3584, 18_944, 28, 28, 4), vocab_size=152_064, tied=False)


def qwen2_5(size: Literal["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]) -> DecoderConfig:
    """Qwen2.5-Instruct of one size: context 32K; beyond it, YaRN with factor 4.

    Raises:
        ValueError: there is no such size.
    """
    # (embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads)
    small = {
        "0.5B": (896, 4864, 24, 14, 2),
        "1.5B": (1536, 8960, 28, 12, 2),
        "3B": (2048, 11_008, 36, 16, 2),
    }
    large = {
        "7B": (3584, 18_944, 28, 28, 4),
        "14B": (5120, 13_824, 48, 40, 8),
        "32B": (5120, 27_648, 64, 40, 8),
        "72B": (8192, 29_568, 80, 64, 8),
    }
    if size in small:
        return _qwen2(small[size], vocab_size=151_936, tied=True)
    if size in large:
        return _qwen2(large[size], vocab_size=152_064, tied=False)
    raise ValueError(f"`size` must be one of {', '.join([*small, *large])}, got {size!r}")


def _llama3_8b(*, theta: float, max_position: int, scaling: RopeScaling | None) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128_256,
        embed_dim=4096,
        hidden_dim=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=max_position,
        norm_eps=1e-5,
        rope=_rope(theta, 128, scaling),
    )


def _qwen2(sizes: tuple[int, int, int, int, int], *, vocab_size: int, tied: bool) -> DecoderConfig:
    embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads = sizes
    head_dim = embed_dim // num_heads
    return DecoderConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=32_768,
        norm_eps=1e-6,
        rope=_rope(1_000_000.0, head_dim),
        qkv_bias=True,
        tie_embeddings=tied,
    )


def _rope(theta: float, rotary_dim: int, scaling: RopeScaling | None = None) -> RopeConfig:
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, interleaved=False, scaling=scaling)
