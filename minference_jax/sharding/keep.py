"""What stays of a layer's keys and values for decoding, of a prompt on several devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from minference_jax.index.lines import last_queries
from minference_jax.kv_cache import KeptKV, KVCompression
from minference_jax.sharding.attention import ShardedAttention
from minference_jax.sharding.parts import gather_last_queries, gather_rows


def keep_sharded(
    compression: KVCompression | None,
    q: Float[Array, "batch kv_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    capacity: int,
    attention: ShardedAttention,
) -> KeptKV:
    """What stays of one layer's prompt, in the order of positions, as one device would keep it.

    Slots are split over the attention's `sequence_axis`, KV heads over its `heads_axis` (every
    device has all of them where they are fewer). Like attention, it gathers a layer's keys and
    values over `sequence_axis` for a moment, and besides only the queries that `compression` reads.

    Args:
        compression: of this layer; everything stays if None.
        q: queries, in `balanced_order` where the prompt is split.
        k: keys, in the same order.
        v: values.
        lengths: real tokens of each row.
        capacity: slots, a multiple of the devices that share a prompt, and enough for what stays.
        attention: whose mesh and axes these are.
    """
    sequence, heads = attention.sequence_axis, attention.heads_axis
    shared = k.shape[2] < attention.head_devices
    of_queries = PartitionSpec(None, sequence, heads)
    of_keys = PartitionSpec(None, sequence, None if shared else heads)
    of_kept: Any = (of_keys, of_keys, PartitionSpec(), PartitionSpec(None, of_keys[2]))
    run = jax.shard_map(
        functools.partial(_on_device, attention=attention, shared=shared, capacity=capacity),
        mesh=attention.auto_mesh,
        in_specs=(PartitionSpec(), of_queries, of_keys, of_keys, PartitionSpec()),
        out_specs=KeptKV(*of_kept),
        check_vma=False,
    )
    return run(compression, q, k, v, lengths)


def _on_device(compression, q, k, v, lengths, *, attention, shared, capacity):
    """The slots that this device stores, of its KV heads."""
    axis, parts = attention.sequence_axis, attention.prompt_devices
    window = 1 if compression is None else max(1, compression.window)
    if parts > 1:
        last, start = gather_last_queries(q, k.shape[1] * parts, lengths, axis, window)
        k, v = gather_rows(k, axis), gather_rows(v, axis)
    else:
        last, start = last_queries(q, lengths=lengths, q_offset=jnp.int32(0), last_q=window)
    if shared:
        last = jax.lax.all_gather(last, attention.heads_axis, axis=2, tiled=True)
    kept = KeptKV(k, v, lengths)
    if compression is not None:
        kept = compression(last, k, v, lengths=lengths, q_start=start)

    def own(x):
        x = jnp.pad(x, ((0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0)))
        if parts == 1:
            return x
        slots = capacity // parts
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * slots, slots, axis=1)

    return kept._replace(keys=own(kept.keys), values=own(kept.values))
