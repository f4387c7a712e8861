"""The stack of layers that every pass goes through, and the modules before and after it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.common.config import DecoderConfig
from models.common.layers import DecoderLayer, Ends
from models.common.rope import rotation_tables

Params = dict[str, Any]


def scan_layers(params, x, cos, sin, attention_fn, attend, state, *, config):
    """Runs all layers: `attend(attention, q, k, v, layer, state) -> (out, state, output)`.

    Returns:
        The residual stream, the final state, and `output` stacked over layers.
    """
    graph = _layer_graph(config, x.dtype)

    def body(carry, layer):
        x, state = carry
        layer_params, attention, index = layer

        def call(q, k, v):
            out, new_state, output = attend(attention, q, k, v, index, state)
            return out, (new_state, output)

        x, (state, output) = nnx.merge(graph, layer_params)(x, cos, sin, call)
        return (x, state), output

    layers = (params["layers"], attention_fn, jnp.arange(config.num_layers, dtype=jnp.int32))
    (x, state), outputs = jax.lax.scan(body, (x, state), layers)
    return x, state, outputs


@functools.cache
def _layer_graph(config: DecoderConfig, dtype: jnp.dtype):
    layer = nnx.eval_shape(lambda: DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


@functools.cache
def _ends_graph(config: DecoderConfig, dtype: jnp.dtype):
    # Not only shapes: an `nnx.Embed` keeps the dtype it was made with as that of its output.
    ends = nnx.eval_shape(lambda: Ends(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(ends)[0]


def ends_of(params: Params, config: DecoderConfig) -> Ends:
    """The modules before and after the layers."""
    graph = _ends_graph(config, params["embed"]["embedding"].dtype)
    return nnx.merge(graph, {name: leaf for name, leaf in params.items() if name != "layers"})


def rotations(shape, q_offset, rope_length, config):
    """Cosines and sines of tokens `[batch, s]`, the first of which are at `q_offset`."""
    positions = jnp.broadcast_to(q_offset + jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    return rotation_tables(config.rope, positions, rope_length)


def run_layer(params, layer, x, rope_length, *, config, attend):
    """Computes one layer of a whole prompt around `attend(q, k, v) -> (out, anything)`.

    Returns:
        The residual stream after it, and `anything`.
    """
    cos, sin = rotations(x.shape[:2], 0, rope_length, config)
    own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])
    return nnx.merge(_layer_graph(config, x.dtype), own)(x, cos, sin, attend)
