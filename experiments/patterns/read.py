"""Prompts read layer by layer, and softmax rows of one head, some at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import minference_jax as mj
from models import Model
from models.common.capture import QKV, embed_prompt, layer_output, layer_qkv

# What an analysis finds: on the device, and once fetched.
AnyArray = Array | np.ndarray

# Query rows whose weights over all keys are held at a time.
ROWS = 128


def layers_of(
    model: Model, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> Iterator[tuple[int, list[QKV]]]:
    """Reads prompts with dense attention; yields the arrays of one layer after another.

    Args:
        model: the model.
        prompts: tokens of each prompt; longer ones are cut to the length of the shortest. What a
            token sees lies before it, so that its rows are the same.
        layers: numbers of the layers to yield, ascending.

    Yields:
        The layer's number, and `QKV` of batch 1 for each prompt.
    """
    length = min(map(len, prompts))
    config, lengths = model.config, jnp.array([length], jnp.int32)
    at = {"config": config, "lengths": lengths}
    streams = [
        embed_prompt(model.params, jnp.array([tokens[:length]], jnp.int32), **at)
        for tokens in prompts
    ]
    for layer in tqdm(
        range(layers[-1] + 1), desc="layers", unit="layer", leave=False, disable=None
    ):
        if layer in layers:
            yield layer, [layer_qkv(model.params, layer, x, **at) for x in streams]
        if layer < layers[-1]:
            dense = mj.DenseAttention()
            streams = [layer_output(model.params, layer, x, dense, **at) for x in streams]


def spread_rows(length: int, rows: int, first: int = 0) -> Int[np.ndarray, " rows"]:
    """Up to `rows` query rows, evenly spread from `first` to the last one."""
    return np.unique(np.linspace(first, length - 1, min(rows, length - first)).round().astype(int))


def over_heads(one: Callable[..., Any], *pairs: tuple[Array, Array]) -> Any:
    """Runs `one(q, k, ...)`, a function of one head's rows [length, head_dim], on every head.

    Args:
        one: the function.
        pairs: queries [1, length, heads, head_dim] and keys [1, length, kv_heads, head_dim].

    Returns:
        What it returns, with a leading [heads] axis. One head is worked on at a time.
    """
    heads = pairs[0][0].shape[2]

    def head(number):
        arrays = []
        for q, k in pairs:
            arrays += [q[0, :, number], k[0, :, number // (heads // k.shape[2])]]
        return one(*arrays)

    return jax.lax.map(head, jnp.arange(heads))


def weights_of(
    q: Float[Array, "length head_dim"],
    k: Float[Array, "length head_dim"],
    rows: Int[Array, " rows"],
) -> Float[Array, "rows length"]:
    """Softmax weights of some query rows of one head over all keys, in float32.

    Rows at or beyond the length, which fill a last block, weigh nothing.
    """
    length = k.shape[0]
    queries = q[jnp.minimum(rows, length - 1)].astype(jnp.float32)
    scores = jnp.dot(queries, k.astype(jnp.float32).T, precision="highest")
    causal = jnp.arange(length)[None, :] <= rows[:, None]
    weights = jax.nn.softmax(jnp.where(causal, scores * q.shape[1] ** -0.5, -jnp.inf), axis=1)
    return jnp.where((rows < length)[:, None], weights, 0.0)


def row_blocks(rows: Int[Array, " rows"], length: int) -> Int[Array, "blocks block"]:
    """Rows in blocks of at most ROWS; a last one is filled with `length`, which is no row."""
    block = min(ROWS, rows.shape[0])
    blocks = -(-rows.shape[0] // block)
    return jnp.pad(rows, (0, blocks * block - rows.shape[0]), constant_values=length).reshape(
        blocks, block
    )
