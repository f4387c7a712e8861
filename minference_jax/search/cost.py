"""What a candidate costs: the work that the kernel executes for the prompt's own index."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minference_jax.index import dense_index
from minference_jax.index.fallback import executed_by
from minference_jax.pairs import CountedPairs
from pallas_kernels import BlockSparseIndex
from pallas_kernels.block_sparse_attention.index import num_q_blocks, resolve_lengths

# "flops": key tiles that the kernel executes, tiles of gathered columns among them.
# "density": (query, key) pairs that a query sees through them.
Measure = Literal["flops", "density"]


class Work(NamedTuple):
    """Sums over prompts: what is executed, and what dense attention would execute."""

    sparse: Float[Array, "*any heads"]
    dense: Float[Array, "*any heads"]


def work_of(
    index: BlockSparseIndex | CountedPairs, length: int, lengths: Array | None, measure: Measure
) -> Work:
    """Counts the work of each head for a batch of prompts.

    Args:
        index: of prompts padded to `length` tokens, or what a baseline counted for them.
        length: query and key rows.
        lengths: real tokens of each prompt, all of them if None.
        measure: what is counted.
    """
    if measure == "density":
        pairs = index.visited_pairs(length, length, lengths=lengths)
        return Work(*(jnp.sum(x, axis=0) for x in pairs))
    if isinstance(index, CountedPairs):
        size = 128  # of both sides of dense attention's tiles
        batch, heads = index.executed.shape
        dense = dense_index(
            batch, heads, length, length, lengths=lengths, block_q=size, block_kv=size
        )
        pairs = jnp.sum(dense.count, axis=(0, 2)).astype(jnp.float32) * size**2
        return Work(jnp.sum(index.executed, axis=0), pairs)
    batch, heads = index.column_count.shape
    lengths, _ = resolve_lengths(batch, length, length, lengths, None)
    blocks = {"block_q": index.block_q, "block_kv": index.block_kv}
    first = jnp.arange(num_q_blocks(length, index.block_q)) * index.block_q
    tiles = executed_by(index, first, lengths)
    dense = dense_index(batch, heads, length, length, lengths=lengths, **blocks).count
    return Work(*(jnp.sum(x, axis=(0, 2)).astype(jnp.float32) for x in (tiles, dense)))
