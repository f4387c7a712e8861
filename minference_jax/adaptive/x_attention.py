"""XAttention: key blocks by sums over antidiagonals, until a share of the mass is kept."""

import dataclasses
import functools
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive.layout import Layout, check_number, per_list, split_heads
from minference_jax.adaptive.lists import each_list, index_of_blocks, own_blocks
from minference_jax.adaptive.scores import masked_softmax, products
from minference_jax.index.select import top_mass_mask
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv

# Lengths of the front of the keys that query tiles may be scored against. Half of all pairs are
# causal; this many lengths score (1 + 1 / _FRONTS) / 2 of them.
_FRONTS = 4


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class XAttention:
    """Keeps for each query tile the fewest key blocks that hold a share `tau` of its mass.

    Queries and keys are grouped by `stride`; the score of two groups is the sum of the scaled
    products on the antidiagonal of their square, divided by `stride`. The softmax of that over the
    groups of keys that begin no later than the group of queries, summed over the groups in a query
    tile and a key block, is the block's mass (ICML 2025). The first block and the query
    tile's own are always kept; their mass counts.

    Attributes:
        tau: share of the mass to keep, 0 to 1; more keeps more.
        stride: rows and keys of a group (static; divides block_q and block_kv).
    """

    by_tile: ClassVar[bool] = True
    tau: Any
    stride: int = dataclasses.field(default=16, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a parameter out of range."""
        check_number("tau", self.tau, 0.0, 1.0)
        check_number("stride", self.stride, 1, 2**31)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
    ) -> BlockSparseIndex:
        """The index; see `Estimator`."""
        stride = self.stride
        if layout.block_q % stride or layout.block_kv % stride:
            raise ValueError(
                f"`stride` ({stride}) must divide `block_q` ({layout.block_q}) and `block_kv` "
                f"({layout.block_kv})"
            )
        q_len, kv_len = q.shape[1], k.shape[1]
        end = jnp.minimum(lengths, q_offset + q_len)
        q = split_heads(q, k.shape[2], layout)
        num_blocks = cdiv(kv_len, layout.block_kv)
        grouped = jax.vmap(functools.partial(_group_keys, stride=stride), in_axes=(1, None, None))
        keys = jax.vmap(grouped, in_axes=(0, 0, None))(k, end, num_blocks * layout.block_kv)
        ends = {cdiv(num_blocks * (part + 1), _FRONTS) for part in range(_FRONTS)}
        # Cut here: inside the loop over query tiles each step would copy its front.
        fronts = [keys[:, :, : x * layout.block_kv // stride] for x in sorted(ends)]
        choose = functools.partial(_choose, layout=layout, stride=stride)
        return index_of_blocks(
            each_list(choose, per_list(self.tau, "tau", q), fronts, layout.block_q),
            q, kv_len, lengths=lengths, q_offset=q_offset, layout=layout,
            scores_per_tile=layout.block_q // stride * keys.shape[2],
        )  # fmt: skip


def _group_keys(k, end, padded, *, stride):
    """Keys of one head [kv_len, head_dim], `stride` of them side by side; 0 from `end` on."""
    k = jnp.where(jnp.arange(k.shape[0])[:, None] < end, k, 0)
    k = jnp.pad(k, ((0, padded - k.shape[0]), (0, 0)))
    return k.reshape(padded // stride, -1)


def _choose(tau, fronts, rows, tile, first, end, *, layout, stride):
    """Blocks [tiles, num_blocks] that some query tiles of one list keep; see `each_list`."""
    mass = _mass_before(fronts, rows, first, end, layout=layout, stride=stride)
    num_blocks = mass.shape[1]
    block = jnp.arange(num_blocks)[None, :]
    forced = own_blocks(first, num_blocks, layout) | (block == 0)

    def one_tile(mass, forced):
        rest = jnp.where(forced, -1.0, mass)
        needed = tau * jnp.sum(mass) - jnp.sum(jnp.where(forced, mass, 0.0))
        return forced | top_mass_mask(rest, needed)

    return jax.vmap(one_tile)(mass, forced)


def _mass_before(fronts, rows, first, end, *, layout, stride):
    """`block_mass` of all key blocks, from the shortest front of the keys that holds every row.

    Later keys have no mass.
    """
    blocks = [len(keys) * stride // layout.block_kv for keys in fronts]

    def of_front(keys):
        mass = block_mass(keys, rows, first, end, layout=layout, stride=stride)
        return jnp.pad(mass, ((0, 0), (0, blocks[-1] - mass.shape[1])))

    ends = jnp.array(blocks[:-1], jnp.int32) * layout.block_kv
    which = jnp.sum(ends < first[-1] + layout.block_q)
    return jax.lax.switch(which, [functools.partial(of_front, keys) for keys in fronts])


def block_mass(keys, rows, first, end, *, layout, stride):
    """Softmax mass between query tiles and key blocks [tiles, num_blocks], of one list.

    Args:
        keys: grouped keys [groups, stride * head_dim].
        rows: queries [tiles, members, block_q, head_dim].
        first: positions of the query tiles' first rows [tiles].
        end: position after the last real query.
        layout: tile sizes.
        stride: rows and keys of a group.
    """
    tiles, members, block_q, head_dim = rows.shape
    position = first[:, None] + jnp.arange(block_q)[None, :]
    rows = jnp.where((position < end)[:, None, :, None], rows, 0)
    # Row by row backwards against keys forwards: the products of an antidiagonal.
    rows = rows.reshape(tiles, members, -1, stride, head_dim)[:, :, :, ::-1]
    rows = rows.reshape(tiles, members, -1, stride * head_dim)
    begins = position[:, ::stride]
    key = jnp.arange(keys.shape[0]) * stride
    visible = key[None, None, :] <= begins[:, :, None]
    visible = (visible & (begins < end)[:, :, None])[:, None]
    scores = products(rows, keys) * (head_dim**-0.5 / stride)
    share = jnp.sum(masked_softmax(scores, visible), axis=(1, 2))
    return jnp.sum(share.reshape(tiles, -1, layout.block_kv // stride), axis=2)
