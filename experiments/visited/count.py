"""Lines of a model's heads on a prompt, and what our index and the original visit for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import minference_jax as mj
from experiments.visited.original import original_pairs
from minference_jax.attention import LAST_Q
from minference_jax.index import build_index
from minference_jax.index.fallback import executed_tiles
from minference_jax.index.lines import choose_lines, last_query_scores
from models import Model
from models.common.decoder import prefill

BLOCK_Q = 128


def count_lines(
    patterns: mj.HeadPatterns, q: Array, k: Array, *, block_kvs: tuple[int, ...]
) -> dict[str, Any]:
    """Counts, for one layer and each budget, the pairs that the library's index visits.

    Args:
        patterns: vertical-slash patterns [budgets, heads].
        q: queries [1, length, heads, head_dim].
        k: keys [1, length, kv_heads, head_dim].
        block_kvs: keys of a tile.

    Returns:
        The chosen `columns` and `distances`, bool [budgets, heads, length], and for each block_kv
        (visited, executed) pairs of staggered lists without dense fallback, each [budgets, heads].
    """
    length = k.shape[1]
    lengths, q_offset = jnp.full((1,), length, jnp.int32), jnp.int32(0)
    scores = last_query_scores(q, k, lengths=lengths, q_offset=q_offset, last_q=LAST_Q)

    def one_budget(patterns):
        columns, distances = choose_lines(*scores, patterns, lengths=lengths)
        pairs = {}
        for block_kv in block_kvs:
            index = build_index(
                patterns, q, k, block_q=BLOCK_Q, block_kv=block_kv, last_q=LAST_Q, stagger=True
            )
            last_row = (1 + jnp.arange(index.count.shape[2])) * BLOCK_Q - 1
            tiles = executed_tiles(
                index.count, index.columns, index.column_count, last_row, block_kv
            )
            executed = jnp.sum(tiles.astype(jnp.float32), axis=2) * BLOCK_Q * block_kv
            pairs[block_kv] = index.visited_pairs(length, length)[0][0], executed[0]
        return {"columns": columns[0], "distances": distances[0], "pairs": pairs}

    return jax.lax.map(one_budget, patterns)


def read_lines(
    model: Model,
    tokens: Int[np.ndarray, "1 length"],
    patterns: mj.HeadPatterns,
    block_kvs: tuple[int, ...],
) -> dict[str, Any]:
    """Reads a prompt with dense attention and returns `count_lines` of every layer, in numpy.

    Every array gets a leading [layers] axis.
    """
    count = functools.partial(count_lines, patterns, block_kvs=block_kvs)

    def observe(attention, q, k, v, *, lengths, q_offset):
        return attention(q, k, v, lengths=lengths, q_offset=q_offset), count(q, k)

    *_, counted = prefill(
        model.params, jnp.asarray(tokens), config=model.config,
        attention_fn=mj.DenseAttention(), observe=observe,
    )  # fmt: skip
    return jax.tree.map(np.asarray, counted)


def figures(counted: dict[str, Any], budget: int, length: int) -> dict[str, Any]:
    """What one budget visits in every layer: the original, and ours for each block_kv.

    Densities are shares of the causal pairs, executed ones with everything that a kernel computes;
    ratios are ours over the original's: of all pairs, of each layer's, and the largest of a head.
    """
    causal = length * (length + 1) // 2
    masks = zip(counted["columns"][:, budget], counted["distances"][:, budget], strict=True)
    original = np.array(
        [[original_pairs(*lines) for lines in zip(*layer, strict=True)] for layer in masks], float
    )

    def densities(pairs):
        return {
            "visited": pairs[0].mean() / causal,
            "executed": pairs[1].mean() / causal,
            "visited_by_layer": pairs[0].mean(axis=1) / causal,
        }

    def ours(pairs):
        visited, executed = pairs = [np.asarray(x[:, budget], np.float64) for x in pairs]
        return densities(pairs) | {
            "visited_ratio": visited.sum() / original[..., 0].sum(),
            "executed_ratio": executed.sum() / original[..., 1].sum(),
            "visited_ratio_by_layer": visited.sum(axis=1) / original[..., 0].sum(axis=1),
            "visited_ratio_of_heads": {
                "mean": (visited / original[..., 0]).mean(),
                "max": (visited / original[..., 0]).max(),
            },
        }

    return {
        "original": densities((original[..., 0], original[..., 1])),
        "ours": {str(block_kv): ours(pairs) for block_kv, pairs in counted["pairs"].items()},
    }
