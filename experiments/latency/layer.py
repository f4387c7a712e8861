"""Times of one attention layer: the whole, its index, its attention, dense, and dense peers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import minference_jax as mj
from experiments.latency.peers import jax_dense, timed, tokamax_dense, torch_flash
from pallas_kernels import block_sparse_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """One layer at one length; seconds are medians.

    Attributes:
        length: tokens.
        density: mean share of the causal pairs that the heads visit.
        sparse: index estimation and attention, as a model runs them.
        index: estimation of the index alone.
        attention: the attention kernel alone, gather of columns included.
        dense: our kernel with the list of all tiles.
        peers: dense attention by others: `seconds`, or why it was `skipped`.
        runs: every single measurement behind the medians.
    """

    length: int
    density: float
    sparse: float
    index: float
    attention: float
    dense: float
    peers: dict[str, dict[str, Any]]
    runs: dict[str, list[float]]

    def best_peer(self) -> tuple[str, float] | None:
        """The fastest dense peer that ran and its seconds, if one ran."""
        ran = {name: np.median(p["seconds"]) for name, p in self.peers.items() if "seconds" in p}
        return min(((n, float(s)) for n, s in ran.items()), key=lambda pair: pair[1], default=None)


def measure_layer(
    attention: mj.SparseAttention, q: Array, k: Array, v: Array, *, repeats: int
) -> LayerTimes:
    """Times one layer's attention on one prompt.

    Args:
        attention: sparse attention of one layer.
        q: queries [1, length, heads, head_dim].
        k: keys [1, length, kv_heads, head_dim].
        v: values.
        repeats: timed calls of each part, fewer where one takes over a second.
    """
    length = q.shape[1]
    dense = jax.jit(mj.DenseAttention(implementation=attention.implementation))
    whole = jax.jit(lambda attention, q, k, v: attention(q, k, v))
    # The compiler drops the attention, whose output is not used.
    build = jax.jit(lambda attention, q, k, v: attention.attend(q, k, v)[1])
    attend = jax.jit(
        lambda q, k, v, index: block_sparse_attention(
            q, k, v, index, implementation=attention.implementation
        )
    )
    index = jax.block_until_ready(build(attention, q, k, v))
    runs = {
        "sparse": timed(lambda: whole(attention, q, k, v), repeats=repeats),
        "index": timed(lambda: build(attention, q, k, v), repeats=repeats),
        "attention": timed(lambda: attend(q, k, v, index), repeats=repeats),
        "dense": timed(lambda: dense(q, k, v), repeats=repeats),
    }
    density = float(jnp.mean(index.density(length, length)))
    peers = {
        "jax.nn": jax_dense(q, k, v, repeats=repeats),
        "torch FA2": torch_flash(q, k, v, repeats=repeats),
        "tokamax": tokamax_dense(q, k, v, repeats=repeats),
    }
    medians = {name: float(np.median(seconds)) for name, seconds in runs.items()}
    return LayerTimes(length=length, density=density, peers=peers, runs=runs, **medians)
