"""Attention kept against work done: the patterns, and the heaviest keys of each query (Fig. 3c)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import minference_jax as mj
from experiments.patterns.read import AnyArray, over_heads, row_blocks, weights_of
from minference_jax.index import build_index
from minference_jax.index.lines import LAST_Q
from minference_jax.metrics import attention_recall
from minference_jax.search import for_heads
from minference_jax.search.cost import work_of
from minference_jax.search.space import scaled

# Proportions of sizes: those of the paper's candidates (Table 7).
FAMILIES: tuple[mj.Pattern, ...] = (
    mj.AShape(sink_size=1024, window_size=4096),
    mj.VerticalSlash(vertical_size=500, slash_size=1500),
    mj.BlockSparse(num_blocks=100),
)


class Tradeoff(NamedTuple):
    """For every candidate and head of a layer.

    Attributes:
        recall: attention inside what is visited, mean over the rows looked at.
        visited: pairs of query and key visited, over the causal ones.
        executed: key tiles that the kernel executes, over those of dense attention.
    """

    recall: Float[AnyArray, "candidates heads"]
    visited: Float[AnyArray, "candidates heads"]
    executed: Float[AnyArray, "candidates heads"]


def ladder(families: Sequence[mj.Pattern], heads: int, length: int, steps: int) -> mj.HeadPatterns:
    """Budgets [families * steps, heads] of each pattern, from a few lines to the whole prompt."""
    # The smallest budgets hardly differ: what a pattern always visits decides.
    at = np.broadcast_to(np.linspace(0.25, 1.0, steps)[:, None], (steps, heads))
    candidates = for_heads([family for family in families for _ in range(steps)], heads)
    return scaled(candidates, np.tile(at, (len(families), 1)), length=length, most=1.0)


@functools.partial(jax.jit, static_argnames="dense_above")
def tradeoff(
    candidates: mj.HeadPatterns,
    q: Float[Array, "1 length heads head_dim"],
    k: Float[Array, "1 length kv_heads head_dim"],
    rows: Int[Array, " rows"],
    *,
    lengths: Int[Array, " 1"] | None = None,
    dense_above: float | None = None,
) -> Tradeoff:
    """What patterns keep and cost on a prompt, one candidate after another.

    Tiles have 128 keys, staggered over 128 queries.

    Args:
        candidates: patterns [candidates, heads].
        q: queries.
        k: keys.
        rows: queries whose recall is taken.
        lengths: real tokens, all if None; prompts of several lengths share a program.
        dense_above: see `SparseAttention`; None keeps every list.
    """
    length = q.shape[1]

    def one(patterns):
        index = build_index(
            patterns, q, k, lengths=lengths, block_q=128, block_kv=128, last_q=LAST_Q,
            dense_above=dense_above, stagger=True,
        )  # fmt: skip
        shares = (work_of(index, length, lengths, name) for name in ("density", "flops"))
        recall = attention_recall(q, k, index, lengths=lengths, rows=rows)
        return Tradeoff(jnp.mean(recall[0], axis=1), *(x.sparse / x.dense for x in shares))

    return jax.lax.map(one, candidates)


@functools.partial(jax.jit, static_argnames="ks")
def top_k_recall(
    q: Float[Array, "1 length heads head_dim"],
    k: Float[Array, "1 length kv_heads head_dim"],
    rows: Int[Array, " rows"],
    *,
    ks: tuple[int, ...],
) -> Float[Array, "ks heads"]:
    """Attention inside the k heaviest keys of each query, in the mean over some queries."""
    blocks = row_blocks(rows, k.shape[1])
    last = jnp.array(ks) - 1

    def one_head(q, k):
        def one_block(total, block):
            held = jnp.cumsum(-jnp.sort(-weights_of(q, k, block), axis=1), axis=1)
            return total + jnp.sum(held[:, last], axis=0), None

        return jax.lax.scan(one_block, jnp.zeros(len(ks)), blocks)[0] / rows.shape[0]

    return over_heads(one_head, (q, k)).T


def top_k_density(ks: Sequence[int], length: int) -> Float[np.ndarray, " ks"]:
    """Pairs of a query and one of its k keys, over the causal ones: what Top-K has to compute."""
    sizes = np.asarray(ks, np.float64)
    pairs = sizes * (sizes + 1) / 2 + sizes * (length - sizes)
    return pairs / (length * (length + 1) / 2)
