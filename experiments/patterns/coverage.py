"""How much attention the k heaviest keys hold, and whether another prompt's would do (Fig. 2b, 2c).

Two readings of "top k": one set of columns for all queries of a head, and a set for each query.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.patterns.read import AnyArray, over_heads, row_blocks, weights_of
from minference_jax.index.select import top_k_mask


class Kept(NamedTuple):
    """For every head and every k, means over query rows.

    Attributes:
        own: share of the attention inside the k keys that hold most of it.
        other: share inside the k keys that hold most of another prompt's, at the same positions.
        overlap: share of the k keys that the two prompts have in common; of the keys that there
            are, where a query has fewer than k.
    """

    own: Float[AnyArray, "heads ks"]
    other: Float[AnyArray, "heads ks"]
    overlap: Float[AnyArray, "heads ks"]


@jax.jit
def column_mass(
    q: Float[Array, "1 length heads head_dim"], k: Float[Array, "1 length kv_heads head_dim"]
) -> Float[Array, "heads length"]:
    """Mean attention that each key gets from all queries; a head's sum is 1. O(length) memory."""
    length = k.shape[1]
    blocks = row_blocks(jnp.arange(length), length)

    def one_head(q, k):
        add = lambda total, rows: (total + jnp.sum(weights_of(q, k, rows), axis=0), None)
        return jax.lax.scan(add, jnp.zeros(length), blocks)[0] / length

    return over_heads(one_head, (q, k))


@functools.partial(jax.jit, static_argnames="ks")
def columns_kept(
    mass: Float[Array, "heads length"], other: Float[Array, "heads length"], *, ks: tuple[int, ...]
) -> Kept:
    """What one set of k columns keeps for all queries of a head, from two prompts' `column_mass`.

    Args:
        mass: of the prompt.
        other: of another prompt, whose columns are tried on this one.
        ks: sizes of the sets, at most the length.
    """

    def one_head(mass, other):
        present = jnp.ones((1, mass.shape[0]), bool)
        return jax.tree.map(lambda x: x[0], _kept(mass[None], other[None], present, ks))

    return jax.vmap(one_head)(mass, other)


@functools.partial(jax.jit, static_argnames="ks")
def rows_kept(
    prompt: tuple[Array, Array],
    other: tuple[Array, Array],
    rows: Int[Array, " rows"],
    *,
    ks: tuple[int, ...],
) -> Kept:
    """What k keys chosen for each query keep, in the mean over some queries.

    Args:
        prompt: queries [1, length, heads, head_dim] and keys [1, length, kv_heads, head_dim].
        other: those of another prompt of the same length; the query at the same position chooses.
        rows: the queries looked at.
        ks: sizes of the sets, at most the length.
    """
    length = prompt[1].shape[1]
    blocks = row_blocks(rows, length)

    def one_head(q, k, q_other, k_other):
        def one_block(total, block):
            weights, others = weights_of(q, k, block), weights_of(q_other, k_other, block)
            present = jnp.arange(length)[None, :] <= block[:, None]
            real = (block < length)[:, None]
            kept = _kept(weights, others, present, ks)
            return jax.tree.map(lambda t, x: t + jnp.sum(x * real, axis=0), total, kept), None

        zero = Kept(*(jnp.zeros(len(ks)),) * 3)
        total = jax.lax.scan(one_block, zero, blocks)[0]
        return jax.tree.map(lambda x: x / rows.shape[0], total)

    return over_heads(one_head, prompt, other)


def _kept(weights, others, present, ks: Sequence[int]) -> Kept:
    """`Kept` of each row [rows, ks], from weights [rows, keys]; keys not `present` cannot be taken.

    Of equal weights the earlier one is heavier.
    """
    heaviest = jax.vmap(top_k_mask, in_axes=(0, None))
    candidates = [jnp.where(present, x, -1.0) for x in (weights, others)]
    sizes = jnp.sum(present, axis=1)

    def one(size):
        mine, theirs = (heaviest(x, size) for x in candidates)
        inside = lambda chosen: jnp.sum(jnp.where(chosen, weights, 0.0), axis=1)
        common = jnp.sum(mine & theirs, axis=1) / jnp.minimum(size, sizes)
        return Kept(inside(mine), inside(theirs), common)

    return Kept(*(jnp.moveaxis(x, 0, 1) for x in jax.lax.map(one, jnp.array(ks))))
