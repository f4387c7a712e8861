"""What the Triton kernel is tested on besides the cases shared with the other implementations."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.block_sparse_attention import BlockSparseIndex
from pallas_kernels.block_sparse_attention import workloads as make
from tests.kernels.attention_cases import CASES, Case, columns_only_index, empty_index, mixed_index

# Tile starts of four query tiles: past the end, past the diagonal, before key 0 in part, wholly.
_STARTS = [[1024, 128, 0, -128], [168, 40, -88], [], [488, 360, -8, -136, -1000]]
_COLUMNS = [0, 1, 39, 40, 100, 300, 400, 499]


def odd_index(batch, heads, q_len, kv_len, *, block_kv):
    """Lists of absolute starts that no builder here would make, but the index allows."""
    del q_len, kv_len
    width = max(map(len, _STARTS))
    entries = np.full((len(_STARTS), width), -(2**30))
    for row, tiles in enumerate(_STARTS):
        entries[row, : len(tiles)] = tiles
    each = lambda x: jnp.asarray(np.broadcast_to(x, (batch, heads, *np.shape(x))), jnp.int32)
    return BlockSparseIndex(
        entries=each(entries.reshape(-1)),
        begin=each(np.arange(len(_STARTS)) * width),
        count=each(np.array([len(x) for x in _STARTS])),
        origin=each(np.zeros(len(_STARTS))),
        columns=each(np.array(_COLUMNS)),
        column_count=each(np.array(len(_COLUMNS))),
        block_q=128,
        block_kv=block_kv,
    )


_LINES = {"vertical": 45, "slash": 20, "spread": "clustered"}
_ODD = Case(name="odd-starts", index=odd_index, q_len=500, kv_len=500, heads=2, lengths=(497,))
_SMALL_TILES = Case(
    name="tiles-of-64", index=make.vertical_slash_index, options=_LINES | {"block_q": 64},
    q_len=150, kv_len=190, heads=2, head_dim=64, block_kv=64,
)  # fmt: skip
_WIDE_TILES = Case(
    name="tiles-of-192-keys-d96", index=make.vertical_slash_index, options=_LINES, q_len=150,
    kv_len=430, heads=2, head_dim=96, block_kv=192,
)  # fmt: skip

# For a GPU: the shared suite and these.
GPU_CASES = [*CASES, _ODD, _SMALL_TILES, _WIDE_TILES]

# For the interpreter, which takes seconds where a GPU takes microseconds.
_STAGGERED = Case(
    name="staggered-row-lengths", index=mixed_index, options={"staggered": True}, batch=2,
    q_len=190, kv_len=400, head_dim=96, lengths=(400, 317),
)  # fmt: skip
INTERPRETED_CASES = [
    _ODD,
    _WIDE_TILES,
    _STAGGERED,
    Case(name="one-token-gqa7", index=mixed_index, q_len=1, kv_len=1, heads=7, kv_heads=1),
    Case(name="d256", index=mixed_index, q_len=130, kv_len=130, heads=2, head_dim=256, block_kv=64),
    Case(name="empty", index=empty_index, q_len=140, kv_len=140, heads=2),
    Case(name="columns-only", index=columns_only_index, q_len=140, kv_len=140, heads=2),
]
# The same with blocks smaller than the tiles.
SMALL_BLOCK_CASES = [_SMALL_TILES, _STAGGERED]


def poison_padding(x: Array, lengths: Array) -> Array:
    """Keys or values past each row's length become NaN: none of them may reach the output."""
    padding = jnp.arange(x.shape[1])[None, :] >= lengths[:, None]
    return jnp.where(padding[:, :, None, None], jnp.asarray(jnp.nan, x.dtype), x)
