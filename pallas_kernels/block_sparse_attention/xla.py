"""The op in plain XLA, for CPUs: per query tile, a loop over groups of tiles of its own list."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.index import BlockSparseIndex, covered_columns
from pallas_kernels.block_sparse_attention.unstagger import unstagger
from pallas_kernels.common import online_softmax
from pallas_kernels.common.tiling import round_up

# Keys of one softmax step: large enough to hide the loop's overhead, small enough for the cache.
_KEYS_PER_STEP = 512


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """Output (float32) and log-sum-exp; work follows the lists, memory is O(N * block)."""
    batch, q_len, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    index = unstagger(index, q_len)
    block_q, block_kv = index.block_q, index.block_kv
    padded = round_up(q_len, block_q)
    scale = head_dim**-0.5 * online_softmax.LOG2E
    q = jnp.pad(q.astype(jnp.float32) * scale, ((0, 0), (0, padded - q_len), (0, 0), (0, 0)))
    q = q.transpose(0, 2, 1, 3).reshape(batch * heads, padded // block_q, block_q, head_dim)
    # A tile may begin before key 0 or end after the last: pad instead of clamping the slice.
    pad = ((0, 0), (0, 0), (block_kv, block_kv), (0, 0))
    k, v = (jnp.pad(x.astype(jnp.float32).transpose(0, 2, 1, 3), pad) for x in (k, v))
    row, head = jnp.divmod(jnp.arange(batch * heads), heads)

    def one_head(args):
        q, row, head = args
        lists = jax.tree.map(lambda x: x[row, head], index)
        kv_head = head // (heads // kv_heads)
        return _one_head(q, k[row, kv_head], v[row, kv_head], lists, lengths[row], q_offset)

    out, lse = jax.lax.map(one_head, (q, row, head))
    out = out.reshape(batch, heads, padded, head_dim).transpose(0, 2, 1, 3)[:, :q_len]
    return out, lse.reshape(batch, heads, padded)[:, :, :q_len]


def _one_head(q, k, v, lists, length, q_offset):
    """One head: q [num_q_blocks, block_q, head_dim], k and v padded by a tile at both ends."""
    num_q_blocks, block_q, head_dim = q.shape
    block_kv = lists.block_kv
    group = max(1, _KEYS_PER_STEP // block_kv)
    capacity = lists.entries.shape[0]
    num_columns = lists.columns.shape[0]
    column_step = min(_KEYS_PER_STEP, max(num_columns, 1))
    padded_columns = round_up(max(num_columns, 1), column_step)
    columns = jnp.pad(
        jnp.where(jnp.arange(num_columns) < lists.column_count, lists.columns, -1),
        (0, padded_columns - num_columns),
        constant_values=-1,
    )
    column_rows = jnp.clip(columns, 0) + block_kv
    k_columns, v_columns = k[column_rows], v[column_rows]
    num_keys = k.shape[0] - 2 * block_kv
    load = jax.vmap(
        functools.partial(jax.lax.dynamic_slice, slice_sizes=(block_kv, head_dim)),
        in_axes=(None, 0),
    )

    def one_tile(args):
        q, number, begin, count, origin = args
        position = q_offset + number * block_q + jnp.arange(block_q)

        def tile_step(i, state):
            slot = i * group + jnp.arange(group)
            used = slot < count
            start = origin + lists.entries[jnp.minimum(begin + slot, capacity - 1)]
            start = jnp.where(used, jnp.clip(start, -block_kv, num_keys), num_keys)
            at = jnp.stack([start + block_kv, jnp.zeros_like(start)], axis=1)
            keys = load(k, at).reshape(group * block_kv, head_dim)
            values = load(v, at).reshape(group * block_kv, head_dim)
            key = (start[:, None] + jnp.arange(block_kv)[None, :]).reshape(-1)
            real = (key >= 0) & (key < length) & jnp.repeat(used, block_kv)
            visible = real[None, :] & (key[None, :] <= position[:, None])
            return online_softmax.step(state, jnp.dot(q, keys.T), visible, values)

        covered = covered_columns(lists.entries, begin, count, origin, columns, block_kv)
        use = (columns >= 0) & (columns < length) & ~covered

        def column_pass(i, state):
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=i * column_step, slice_size=column_step
            )
            visible = take(use)[None, :] & (take(columns)[None, :] <= position[:, None])
            scores = jnp.dot(q, take(k_columns).T)
            return online_softmax.step(state, scores, visible, take(v_columns))

        state = online_softmax.init(block_q, head_dim)
        # Columns of this head that this tile may see: a prefix, since columns ascend.
        reach = jnp.sum((columns >= 0) & (columns <= position[-1]))
        reach = jnp.where(jnp.any(use), reach, 0)
        state = jax.lax.fori_loop(0, -(-reach // column_step), column_pass, state)
        state = jax.lax.fori_loop(0, -(-count // group), tile_step, state)
        return online_softmax.finish(state)

    out, lse = jax.lax.map(
        one_tile, (q, jnp.arange(num_q_blocks), lists.begin, lists.count, lists.origin)
    )
    return out.reshape(num_q_blocks * block_q, head_dim), lse.reshape(num_q_blocks * block_q)
