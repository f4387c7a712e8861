"""Shapes of the published GLM-4 models, for benchmarks and shape-only work.

`load_model` reads a checkpoint's own configuration and never these.
"""

from models.common.config import DecoderConfig, RopeConfig


def glm4_9b_chat() -> DecoderConfig:
    """GLM-4-9B-chat: context 128K, 2 key/value heads."""
    return _glm4_9b(num_kv_heads=2, rope_ratio=500.0, max_position=131_072)


def glm4_9b_chat_1m() -> DecoderConfig:
    """GLM-4-9B-chat-1M (the paper's GLM-4-9B-1M): context 1M, 4 key/value heads."""
    return _glm4_9b(num_kv_heads=4, rope_ratio=10_000.0, max_position=1_048_576)


def _glm4_9b(*, num_kv_heads: int, rope_ratio: float, max_position: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151_552,
        embed_dim=4096,
        hidden_dim=13_696,
        num_layers=40,
        num_heads=32,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_position=max_position,
        norm_eps=1.5625e-07,
        rope=RopeConfig(theta=10_000.0 * rope_ratio, rotary_dim=64, interleaved=True, scaling=None),
        qkv_bias=True,
    )
