"""From chosen distances to the tiles that every query tile of a head shares.

Row t of a query tile whose first row is at position p needs key p + t - d for distance d. Relative
to the tile's origin (p rounded down to a multiple of 8), the tile needs the run of block_q keys
that starts at shift - d, with shift = p mod 8: the same run for every query tile. So one list of
(negative) offsets serves the whole head. Runs start at the nearest multiple of 8, which drops a
distance from at most 4 rows of a query tile but keeps an isolated one at one tile instead of two.

Positions are counted in granules of 8 keys, from the nearest key (granule 0) backwards.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from minference_jax.index.select import compact
from pallas_kernels.block_sparse_attention.index import ALIGNMENT, NO_TILE
from pallas_kernels.common.tiling import cdiv, round_up


def list_capacity(kv_len: int, block_q: int, block_kv: int) -> int:
    """Most tiles that cover every distance below kv_len."""
    return _num_granules(kv_len, block_q, block_kv) * ALIGNMENT // block_kv


def _num_granules(kv_len: int, block_q: int, block_kv: int) -> int:
    return round_up(block_q // ALIGNMENT + 3 + cdiv(kv_len, ALIGNMENT), block_kv // ALIGNMENT)


def tiles_of_distances(
    distances: Bool[Array, " kv_len"],
    shift: Int[Array, ""],
    *,
    block_q: int,
    block_kv: int,
) -> Int[Array, " capacity"]:
    """Cuts the keys that a head's distances need into disjoint tiles (one head).

    Args:
        distances: the chosen distances; 0 is always taken, and taken exactly.
        shift: position of the query tiles' first rows modulo 8.
        block_q: rows of a query tile.
        block_kv: keys of a tile.

    Returns:
        Offsets of the tiles from the query tile's origin, descending, then NO_TILE.
    """
    granules = _num_granules(distances.shape[0], block_q, block_kv)
    per_tile = block_kv // ALIGNMENT
    # Granule u is where the run of distance d ends (its nearest key) iff 8u + shift - 11 <= d <=
    # 8u + shift - 4: rounding to the nearest multiple of 8.
    padded = jnp.pad(distances, (16, ALIGNMENT * granules + 16))[: ALIGNMENT * granules + 32]
    window = jax.lax.dynamic_slice_in_dim(padded, 5 + shift, ALIGNMENT * granules)
    ends = jnp.any(window.reshape(granules, ALIGNMENT), axis=1)
    # A row always sees itself: distance 0 takes the runs rounded both down and up.
    ends = ends.at[1].set(True).at[0].set(ends[0] | (shift > 0))
    total = jnp.cumsum(ends)
    run = block_q // ALIGNMENT
    needed = total - jnp.pad(total, (run, 0))[:granules] > 0
    first = _first_tile_of_chunks(needed.reshape(-1, per_tile))
    chunk = jnp.arange(first.shape[0]) * per_tile
    nearest = block_q // ALIGNMENT - (chunk + first)
    offset = ALIGNMENT * (nearest - per_tile + 1)
    return compact(offset, first < per_tile, first.shape[0], NO_TILE)


def _first_tile_of_chunks(needed: Bool[Array, "chunks granules"]) -> Int[Array, " chunks"]:
    """Greedy cover of needed granules by tiles as wide as a chunk: where each chunk's tile begins.

    Walking from near to far, a tile begins at the first needed granule that no tile covers yet, so
    at most one begins in each chunk, and a chunk is described by a function: from the granules
    that the previous tile covers at its front to those its own tile covers in the next chunk. An
    associative scan composes these functions, in place of a serial walk.

    Returns:
        The granule in the chunk at which its tile begins; the chunk's width if none does.
    """
    width = needed.shape[1]
    granule = jnp.arange(width)
    candidates = jnp.where(needed, granule[None, :], width)
    first = jax.lax.cummin(candidates, axis=1, reverse=True)
    carry = jnp.where(first < width, first, 0)

    def compose(before, after):
        return jnp.take_along_axis(after, before, axis=1)

    carried = jax.lax.associative_scan(compose, carry, axis=0)[:, 0]
    entering = jnp.pad(carried, (1, 0))[:-1]
    return jnp.take_along_axis(first, entering[:, None], axis=1)[:, 0]


def tiles_of_everything(
    kv_len: int, shift: Int[Array, ""], *, block_q: int, block_kv: int
) -> Int[Array, " capacity"]:
    """Offsets of the tiles that cover every key: the dense list."""
    capacity = list_capacity(kv_len, block_q, block_kv)
    nearest = block_q + jnp.where(shift > 0, ALIGNMENT, 0)
    return nearest - block_kv * (1 + jnp.arange(capacity, dtype=jnp.int32))


def count_reaching(
    entries: Int[Array, " capacity"], origin: Int[Array, " num_q_blocks"], block_kv: int
) -> Int[Array, " num_q_blocks"]:
    """How many leading tiles of a shared list hold a key at or after key 0."""
    reached = jnp.searchsorted(-entries, origin + block_kv, side="left", method="scan_unrolled")
    return reached.astype(jnp.int32)
