"""The stack of layers that every pass goes through, and the modules before and after it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.common.config import DecoderConfig
from models.common.layers import DecoderLayer, Ends
from models.common.placement import ONE_DEVICE
from models.common.rope import rotation_tables

Params = dict[str, Any]


def scan_layers(params, x, cos, sin, attention_fn, attend, state, *, config, place=ONE_DEVICE):
    """Runs all layers: `attend(attention, q, k, v, layer, state) -> (out, state, output)`.

    Returns:
        The residual stream, the final state, and `output` stacked over layers.
    """
    graph = _layer_graph(config, x.dtype)

    def body(carry, layer):
        x, state = place.rows(carry[0]), carry[1]
        layer_params, attention, index = layer

        def call(q, k, v):
            out, new_state, output = attend(attention, q, k, v, index, state)
            return out, (new_state, output)

        run = nnx.merge(graph, layer_params)
        x, (state, output) = run(x, cos, sin, call, parts=place.parts)
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


def rotations(batch, positions, rope_length, config):
    """Cosines and sines of `batch` rows of tokens at the same positions."""
    positions = jnp.broadcast_to(positions[None, :], (batch, positions.shape[0]))
    return rotation_tables(config.rope, positions, rope_length)


def run_layer(params, layer, x, rope_length, *, config, attend):
    """Computes one layer of a whole prompt around `attend(q, k, v) -> (out, anything)`.

    Returns:
        The residual stream after it, and `anything`.
    """
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    cos, sin = rotations(x.shape[0], positions, rope_length, config)
    own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])
    return nnx.merge(_layer_graph(config, x.dtype), own)(x, cos, sin, attend)
