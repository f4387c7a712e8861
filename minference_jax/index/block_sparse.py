"""Block-sparse heads: the key blocks of largest mean-pooled score (paper, Algorithm 3)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.patterns import BLOCK_SIZE
from pallas_kernels.block_sparse_attention.index import NO_TILE
from pallas_kernels.common.tiling import cdiv

# Query tiles scored at a time: bounds the score matrix to this many rows for each head.
_ROWS_PER_STEP = 256


def tiles_per_row(num_blocks: int, kv_len: int, block_q: int, block_kv: int) -> int:
    """Tiles a list must hold for a budget of blocks of 64 keys: the diagonal always fits."""
    wanted = max(cdiv(num_blocks * BLOCK_SIZE, block_kv), cdiv(block_q, block_kv) + 1)
    return min(wanted, cdiv(kv_len, block_kv))


def block_tiles(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    num_blocks: Int[Array, " heads"],
    *,
    max_blocks: int,
    lengths: Int[Array, " batch"],
    first: Int[Array, " num_q_blocks"],
    block_q: int,
    block_kv: int,
) -> tuple[
    Int[Array, "batch heads num_q_blocks max_tiles"], Int[Array, "batch heads num_q_blocks"]
]:
    """For each query tile the key tiles of largest score between block means.

    A tile's score is the product of the means of its real queries and keys; only tiles with a
    causal key take part, and those that overlap the query tile's own rows come first. `first` has
    the positions of the query tiles' first rows.

    Returns:
        Starts of the tiles, descending, then NO_TILE; and how many there are.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    budget = -(-num_blocks * BLOCK_SIZE // block_kv)
    max_tiles = tiles_per_row(max_blocks, k.shape[1], block_q, block_kv)
    one_head = functools.partial(
        _one_head, first=first, block_q=block_q, block_kv=block_kv, max_tiles=max_tiles
    )
    group = jax.vmap(one_head, in_axes=(1, None, 0, None))
    kv_group = jax.vmap(group, in_axes=(1, 1, 0, None))
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, q.shape[3])
    starts, count = jax.vmap(kv_group, in_axes=(0, 0, None, 0))(
        grouped, k, budget.reshape(kv_heads, -1), lengths
    )
    flat = (q.shape[0], heads)
    return starts.reshape(*flat, *starts.shape[3:]), count.reshape(*flat, count.shape[3])


def _one_head(q, k, budget, length, *, first, block_q, block_kv, max_tiles):
    """One head: q [q_len, head_dim], k [kv_len, head_dim]."""
    q_mean = _means(q, block_q, jnp.clip(length - first, 0, block_q))
    k_mean = block_means(k, block_kv, length)
    tile_start = jnp.arange(k_mean.shape[0]) * block_kv
    rows = q_mean.shape[0]
    step = min(_ROWS_PER_STEP, rows)
    more = -rows % step
    q_mean, first = jnp.pad(q_mean, ((0, more), (0, 0))), jnp.pad(first, (0, more))

    def choose(q_mean, first):
        scores = jnp.dot(k_mean, q_mean, precision=jax.lax.Precision.HIGHEST)
        last = jnp.minimum(first + block_q, length) - 1
        own = tile_start + block_kv > first
        scores = jnp.where(own, jnp.inf, scores)
        scores = jnp.where(tile_start <= last, scores, -jnp.inf)
        mine = own & (tile_start <= last)
        visible = jnp.sum(scores > -jnp.inf)
        wanted = jnp.minimum(jnp.maximum(budget, jnp.sum(mine)), jnp.minimum(visible, max_tiles))
        wanted = jnp.where(first < length, wanted, 0)
        tile = _largest(scores, wanted, max_tiles)
        use = jnp.arange(max_tiles) < wanted
        starts = jnp.sort(jnp.where(use, tile * block_kv, NO_TILE), descending=True)
        return starts, wanted.astype(jnp.int32)

    starts, count = jax.lax.map(
        lambda args: jax.vmap(choose)(*args),
        (q_mean.reshape(-1, step, q.shape[1]), first.reshape(-1, step)),
    )
    return starts.reshape(-1, max_tiles)[:rows], count.reshape(-1)[:rows]


def _largest(scores, k, capacity):
    """Positions of the k largest scores, then others: [capacity]; ties go to the lower position.

    An unstable top-k needs no sort on a GPU, but names any of several equal scores. Its values are
    certain, so the k-th of them says which positions are in; a second top-k lists these, by keys
    that are all different.
    """
    kth = jax.lax.top_k(scores, capacity, is_stable=False)[0][jnp.maximum(k - 1, 0)]
    size = scores.shape[0]
    key = jnp.arange(size, 0, -1).astype(jnp.float32)
    key = jnp.where(scores > kth, key + size, jnp.where(scores == kth, key, 0.0))
    return jax.lax.top_k(key, capacity, is_stable=False)[1]


def block_means(
    x: Float[Array, "rows width"], block: int, length: Int[Array, ""]
) -> Float[Array, "blocks width"]:
    """Means over blocks of rows, of the rows below length alone; float32, 0 where there is none."""
    begin = jnp.arange(cdiv(x.shape[0], block)) * block
    return _means(x, block, jnp.clip(length - begin, 0, block))


def _means(x, block, real):
    """Means over blocks of rows, of the first `real` [blocks] of each; 0 where there is none."""
    rows, width = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, -rows % block), (0, 0))).reshape(-1, block, width)
    x = jnp.where((jnp.arange(block)[None, :] < real[:, None])[:, :, None], x, 0.0)
    return jnp.sum(x, axis=1) / jnp.maximum(real, 1)[:, None]
