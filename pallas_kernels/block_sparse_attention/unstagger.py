"""Staggered lists as lists of half query tiles, for implementations without a shift."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, num_q_blocks


def unstagger(index: BlockSparseIndex, q_len: int) -> BlockSparseIndex:
    """The same visits with half as many rows a query tile, so that all its rows share one list.

    Args:
        index: returned as it is unless staggered.
        q_len: query rows that the index is for.
    """
    if index.shift is None:
        return index
    block_q = index.block_q // 2
    tiles = num_q_blocks(q_len, block_q)

    def both(first, second):
        return jnp.stack([first, second], axis=3).reshape(*first.shape[:2], -1)[..., :tiles]

    return dataclasses.replace(
        index,
        begin=both(index.begin, index.begin),
        count=both(index.count, index.count),
        origin=both(index.origin, index.origin + index.shift),
        shift=None,
        block_q=block_q,
    )
