"""InfLLM: blocks of distant keys, found by a few representative keys of each."""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minference_jax.adaptive import lists
from minference_jax.adaptive.layout import Layout, check_number, split_heads
from minference_jax.adaptive.scores import products
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.common.tiling import cdiv

# Sizes that are whole numbers of key blocks.
_WHOLE_BLOCKS = ("n_init", "n_local", "exc_block")


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class InfLLM:
    """First keys, a local window, and the distant blocks most relevant to a chunk of queries.

    The method of Xiao et al. (NeurIPS 2024, arXiv:2402.04617) for the prefill; an `Estimator`, to
    be called through `AdaptiveAttention`. For the chunk of `exc_block` queries from position c on:

    * A block of block_kv keys is distant if it follows the first `n_init` keys and ends at or
      before `c - n_local`. All other blocks are visited, up to each query: they hold the first
      keys, the window of every query, and what lies between window and distant blocks.
    * The representative score of key m is the mean of q_{m+j} · k_m over j = 1..n_local; a block's
      representatives are its `repr_topk` keys of largest score. For a distant block these queries
      all lie before c, so a choice depends on nothing behind its chunk (but, as in the paper, on
      all queries of the chunk).
    * Of the distant blocks, the `topk` of largest relevance are visited whole, all if there are no
      more. Relevance is the sum of q · k over the chunk's queries and the block's representatives.
      Blocks of all the past compete: nothing is reset on the way.

    Equal scores go to the lower position. Each list of the layout decides for itself, with sums
    over the query heads that share it: one decision for each KV head with `Layout(shared=True)`,
    which is nearest to the released code (it decides once for a layer).

    Where this differs from the paper and its code:

    * Positions are true ones, in relevance and in attention, because q and k come after rotary
      embedding; InfLLM puts all distant keys at one distance. So a model does not reach beyond the
      length it was made for, and parts of the queries that turn fast cancel in a chunk's sum.
    * Representative scores are the paper's mean products; the released code sums softmax weights.
    * Keys between the window of a query and the distant blocks count as its window, in whole
      blocks.

    Only whole prompts can be read: scores of earlier keys need queries that a chunked prefill no
    longer has. Where `q_offset`, which is data, puts keys before the first query, every key is
    visited.

    Attributes:
        n_local: keys of the local window, the query's own included (static).
        topk: distant blocks of each chunk (static).
        n_init: first keys, always visited (static).
        repr_topk: representatives of a block, at most block_kv (static).
        exc_block: queries that choose together (static; a multiple of block_q). It, `n_local` and
            `n_init` are multiples of block_kv.
    """

    n_local: int = dataclasses.field(default=4096, metadata={"static": True})
    topk: int = dataclasses.field(default=16, metadata={"static": True})
    n_init: int = dataclasses.field(default=128, metadata={"static": True})
    repr_topk: int = dataclasses.field(default=4, metadata={"static": True})
    exc_block: int = dataclasses.field(default=512, metadata={"static": True})

    def __post_init__(self) -> None:
        """Raises ValueError for a size out of range."""
        for name in ("n_local", "topk", "repr_topk", "exc_block"):
            check_number(name, getattr(self, name), 1, 2**30)
        check_number("n_init", self.n_init, 0, 2**30)

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"],
        q_offset: Int[Array, ""],
        layout: Layout,
    ) -> BlockSparseIndex:
        """The index; see `Estimator`.

        Raises:
            ValueError: a size does not suit the layout, or keys come from earlier calls.
        """
        self._check(q.shape[1], k.shape[1], layout)
        if layout.max_blocks is None:
            layout = dataclasses.replace(layout, max_blocks=self._most_blocks(layout.block_kv))
        q = split_heads(q, k.shape[2], layout)
        chosen = self._chosen_blocks(q, k, lengths, layout.block_kv)
        num_blocks = cdiv(k.shape[1], layout.block_kv)
        block = jnp.arange(num_blocks)

        def choose(rows, tile, first, end):
            chunk = first // self.exc_block
            near = ~self._distant(chunk[:, None], block[None, :], layout.block_kv)
            # Keys before the first query: nothing is known about what they matter to.
            near |= q_offset > 0
            found = chosen[:, :, :, chunk, :, None] == block[None, None, None, None, None, :]
            return jnp.any(found, axis=4) | near[None, None, None]

        return lists.index_of_blocks(
            choose, q, k.shape[1], lengths=lengths, q_offset=q_offset, layout=layout,
            scores_per_tile=num_blocks,
        )  # fmt: skip

    def _check(self, q_len, kv_len, layout):
        if q_len != kv_len:
            raise ValueError(
                f"InfLLM reads whole prompts, got {q_len} queries for {kv_len} keys: prefill "
                "without chunks (leave out `chunk_size`)"
            )
        blocks = [(name, "block_kv") for name in _WHOLE_BLOCKS] + [("exc_block", "block_q")]
        for name, of in blocks:
            if getattr(self, name) % getattr(layout, of):
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be a multiple of `{of}` "
                    f"({getattr(layout, of)})"
                )
        if self.repr_topk > layout.block_kv:
            raise ValueError(
                f"`repr_topk` must be at most `block_kv` ({layout.block_kv}), got {self.repr_topk}"
            )

    def _most_blocks(self, block_kv):
        """Most key blocks that a query tile visits."""
        return (self.n_init + self.n_local + self.exc_block) // block_kv + self.topk

    def _distant(self, chunk, block, block_kv):
        """Whether a block competes for a place among those that a chunk visits."""
        passed = (block + 1) * block_kv <= chunk * self.exc_block - self.n_local
        return (block * block_kv >= self.n_init) & passed

    def _chosen_blocks(self, q, k, lengths, block_kv):
        """Distant blocks that each chunk visits [batch, kv_heads, lists, chunks, topk].

        Numbers beyond the last block fill what is not needed.
        """
        batch, _, kv_heads, num_lists, _, _ = q.shape
        one_list = functools.partial(
            self._of_one_list, block_kv=block_kv, num_lists=batch * kv_heads * num_lists
        )
        over_lists = jax.vmap(one_list, in_axes=(1, None, None))
        over_kv_heads = jax.vmap(over_lists, in_axes=(1, 1, None))
        return jax.vmap(over_kv_heads)(q, k, lengths)

    def _of_one_list(self, q, k, length, *, block_kv, num_lists):
        """One list: q [rows, members, head_dim], k [rows, head_dim]; `_chosen_blocks` of all."""
        rows, members, head_dim = q.shape
        real = (jnp.arange(rows) < length)[:, None, None]
        to_blocks = lambda x: jnp.pad(
            x, ((0, -rows % block_kv), *((0, 0),) * (x.ndim - 1))
        ).reshape(-1, block_kv, *x.shape[1:])
        q, k = to_blocks(jnp.where(real, q, 0)), to_blocks(k)
        sums = jnp.sum(q, axis=(1, 2), dtype=jnp.float32)
        num_blocks = k.shape[0]
        block = jnp.arange(num_blocks)
        # Both loops hold a bounded number of intermediates, over all lists.
        at_once = lambda each: max(1, lists.ELEMENTS // (num_lists * each))
        representatives = jax.lax.map(
            functools.partial(self._representatives, q, k, jnp.cumsum(sums, axis=0) - sums),
            block, batch_size=at_once(block_kv * members * head_dim),
        )  # fmt: skip

        per_chunk = self.exc_block // block_kv
        sums = jnp.pad(sums, ((0, -num_blocks % per_chunk), (0, 0)))
        of_chunks = jnp.sum(sums.reshape(-1, per_chunk, head_dim), axis=1)

        def choose(chunk):
            relevance = products(of_chunks[chunk], representatives)
            distant = self._distant(chunk, block, block_kv)
            best, at = jax.lax.top_k(
                jnp.where(distant, relevance, -jnp.inf), min(self.topk, num_blocks)
            )
            return jnp.where(best > -jnp.inf, at, num_blocks)

        chunks = jnp.arange(of_chunks.shape[0])
        return jax.lax.map(choose, chunks, batch_size=at_once(num_blocks))

    def _representatives(self, q, k, before, block):
        """Sum of a block's representative keys [head_dim], if n_local queries follow it.

        Args:
            q: queries by block [blocks, block_kv, members, head_dim].
            k: keys by block [blocks, block_kv, head_dim].
            before: sums of all queries before each block [blocks, head_dim].
            block: which one; what comes out for a block near the end means nothing.
        """
        keys = k[block].astype(jnp.float32)
        later = jnp.minimum(block + self.n_local // keys.shape[0], k.shape[0] - 1)
        # The window of key r begins behind row r of its block and ends with row r of `later`: from
        # the rows between the beginnings of both blocks, those up to r leave and enter.
        enter, leave = (jnp.sum(q[at], axis=1, dtype=jnp.float32) for at in (later, block))
        window = (before[later] - before[block])[None, :] + jnp.cumsum(enter - leave, axis=0)
        _, at = jax.lax.top_k(jnp.sum(keys * window, axis=1), self.repr_topk)
        return jnp.sum(keys[at], axis=0)
