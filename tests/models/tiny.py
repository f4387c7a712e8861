"""Tiny random models and attentions for tests of the decoder itself."""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from models.common.config import DecoderConfig, RopeConfig
from models.common.decoder import abstract_params

CONFIG = DecoderConfig(
    vocab_size=50,
    embed_dim=32,
    hidden_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, rotary_dim=8, interleaved=False, scaling=None),
    qkv_bias=True,
)


@functools.cache
def tiny_params(config=CONFIG, dtype=jnp.float32):
    """Random parameters, norms and biases too, so that each of them matters."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            fan_in = config.hidden_dim if path[-2].key == "down_proj" else config.embed_dim
            noise = noise / fan_in**0.5
        elif kind == "scale":
            noise = 1 + 0.3 * noise
        return jnp.asarray(noise, jnp.float32).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, jnp.float32))


def random_tokens(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, CONFIG.vocab_size, (batch, length)), jnp.int32)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledQueries:
    """An attention with data: each layer returns its queries times its own number."""

    scale: jax.Array

    def __call__(self, q, k, v, *, lengths=None, q_offset=None):
        return q * self.scale
