"""An AttentionFn that runs another one on the devices of a mesh."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from minference_jax.adaptive import AdaptiveAttention, IndexedAttention
from minference_jax.attention import DenseAttention, SparseAttention, take_layer
from minference_jax.baselines import StaticAttention
from minference_jax.index import fallback
from minference_jax.pairs import CountedPairs, Executed
from minference_jax.patterns import Kind
from minference_jax.sharding.parts import attend_by_parts, why_not_by_parts
from pallas_kernels.block_sparse_attention.index import (
    BlockSparseIndex,
    num_q_blocks,
    resolve_lengths,
)
from pallas_kernels.common.checks import check_attention_shapes, check_lengths

# Axes of a mesh: over HEADS_AXIS models split their parameters, too.
HEADS_AXIS, SEQUENCE_AXIS = "model", "context"


def attention_mesh(
    *, heads: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `sequence` x `heads` devices, those that share a prompt's heads side by side.

    Args:
        heads: devices that share the heads (tensor parallel).
        sequence: devices that share a prompt (context parallel).
        devices: all devices of all hosts if None; those beyond `sequence` x `heads` stay idle.

    Raises:
        ValueError: there are not so many devices.
    """
    found = len(jax.devices() if devices is None else devices)
    if heads < 1 or sequence < 1 or heads * sequence > found:
        raise ValueError(
            f"a mesh of {sequence} x {heads} devices (`sequence` x `heads`) needs "
            f"{sequence * heads}, there are {found}: take smaller numbers from 1 on, or try it on "
            "a CPU with XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{max(1, heads * sequence)}"
        )
    names = (SEQUENCE_AXIS, HEADS_AXIS)
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((sequence, heads), names, axis_types=kinds, devices=devices)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedAttention:
    """Another attention on the devices of a mesh: an AttentionFn, to be called inside `jit`.

    Over `heads_axis` each device estimates and attends for its own heads, with its part of the
    attention's arrays; nothing is communicated. Over `sequence_axis` each device holds two chunks
    of every prompt and gathers all keys and values: queries, keys, values and outputs must lie in
    `balanced_order(length, devices)`, where length is a `padded_length` (pass `lengths`). Results
    are those of the attention on one device.

    Attributes:
        attention: any attention for heads alone; over a sequence axis `SparseAttention`,
            `DenseAttention`, or `AdaptiveAttention` by BlockThreshold, BlockMass or XAttention,
            `WithColumns` or without.
        mesh: devices of all hosts (static); for estimates of memory alone, an `AbstractMesh`.
        heads_axis: the mesh axis that splits query heads and KV heads; None splits none (static).
            With fewer KV heads than devices, each device has the one of its query heads.
        sequence_axis: the mesh axis that splits prompts; None splits none (static).
    """

    attention: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    heads_axis: str | None = dataclasses.field(default=HEADS_AXIS, metadata={"static": True})
    sequence_axis: str | None = dataclasses.field(default=SEQUENCE_AXIS, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for an axis that the mesh lacks, or has besides."""
        known = {self.heads_axis, self.sequence_axis}
        for name in known - {None}:
            if name not in self.mesh.shape:
                raise ValueError(
                    f"the mesh has the axes {self.mesh.axis_names}, none is {name!r}; take "
                    "`attention_mesh`, or name its axes (None for what is not split)"
                )
        for name, size in self.mesh.shape.items():
            if name not in known and size > 1:
                raise ValueError(
                    f"the {size} devices of the mesh axis {name!r} would all compute the same: "
                    "name it as `heads_axis` or `sequence_axis`, or leave it out of the mesh"
                )

    layer = take_layer

    @property
    def head_devices(self) -> int:
        """Devices that share the heads."""
        return 1 if self.heads_axis is None else self.mesh.shape[self.heads_axis]

    @property
    def prompt_devices(self) -> int:
        """Devices that share a prompt."""
        return 1 if self.sequence_axis is None else self.mesh.shape[self.sequence_axis]

    @property
    def auto_mesh(self) -> Mesh:
        """The mesh with automatic axes, whatever kind the caller's are."""
        return Mesh(self.mesh.devices, self.mesh.axis_names)

    @property
    def block_q(self) -> int:
        """Query rows of a tile: chunks of a split prompt are whole tiles."""
        return getattr(self.attention, "layout", self.attention).block_q

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """The output; raises as `attend`."""
        return self._run(q, k, v, lengths, q_offset, see=None, seen=None)[0]

    def attend(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], CountedPairs]:
        """The output and how many pairs all devices visited.

        Raises:
            ValueError: the heads or the prompt cannot be split like this, the attention cannot be
                split, or what it raises itself.
        """
        seen = PartitionSpec(None, self.heads_axis)
        return self._run(q, k, v, lengths, q_offset, see=_count, seen=seen)

    def attend_executed(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch q_len heads head_dim"], Executed | None]:
        """The output and what the kernels of all devices compute, at no cost; raises as `attend`.

        Query tiles are in the order of their rows. None of attention without an index of tiles.
        """
        attend = getattr(self.attention, "attend", None)
        if attend is None:
            return self(q, k, v, lengths=lengths, q_offset=q_offset), None
        index = jax.eval_shape(attend, q, k, v, lengths=lengths, q_offset=q_offset)[1]
        if not isinstance(index, BlockSparseIndex):
            return self(q, k, v, lengths=lengths, q_offset=q_offset), None
        of_tiles = PartitionSpec(None, self.heads_axis, self.sequence_axis)
        of_heads, alike = PartitionSpec(None, self.heads_axis), PartitionSpec()
        seen: Any = (of_tiles, of_heads, alike, alike)
        return self._run(q, k, v, lengths, q_offset, see=_executed, seen=Executed(*seen))

    def _run(self, q, k, v, lengths, q_offset, *, see, seen) -> tuple[Any, Any]:
        check_attention_shapes(q, k, v)
        check_lengths(lengths, q.shape[0], k.shape[1])
        self._check(q, k, q_offset)
        lengths, _ = resolve_lengths(q.shape[0], q.shape[1], k.shape[1], lengths, q_offset)
        # What does not fit the attention is told in numbers of the whole.
        jax.eval_shape(self.attention, q, k, v, lengths=lengths, q_offset=q_offset)
        attention = _decided(self.attention, q, k)

        queries = keys = PartitionSpec(None, self.sequence_axis, self.heads_axis)
        if k.shape[2] < self.head_devices:
            keys = PartitionSpec(None, self.sequence_axis)
        arrays = jax.tree_util.tree_map_with_path(
            functools.partial(self._spec_of_array, heads={q.shape[2], k.shape[2]}), attention
        )
        everywhere = PartitionSpec()
        run = jax.shard_map(
            functools.partial(self._on_device, kv_heads=k.shape[2], see=see),
            mesh=self.auto_mesh,
            in_specs=(arrays, queries, keys, keys, everywhere, everywhere),
            out_specs=(queries, seen),
            check_vma=False,  # kernels loop as long as their data says
        )
        return run(jax.tree.map(jnp.asarray, attention), q, k, v, lengths, q_offset)

    def _on_device(self, attention, q, k, v, lengths, q_offset, *, kv_heads, see):
        """The output of this device's heads and rows, and what `see` finds of these."""
        if kv_heads < self.head_devices:
            own = jax.lax.axis_index(self.heads_axis) * kv_heads // self.head_devices
            k, v = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k, v))
        axis = self.sequence_axis
        kv_len = k.shape[1] * self.prompt_devices
        at: dict[str, Any] = {"lengths": lengths, "q_offset": q_offset}
        if axis is not None and self.prompt_devices > 1:
            chunks = attend_by_parts(attention, q, k, v, lengths=lengths, axis=axis)
        elif see is None:
            return attention(q, k, v, **at), None
        else:
            _, offset = resolve_lengths(q.shape[0], q.shape[1], kv_len, lengths, q_offset)
            chunks = [(*attention.attend(q, k, v, **at), offset)]
        out = jnp.concatenate([out for out, _, _ in chunks], axis=1)
        if see is None:
            return out, None
        return out, see(chunks, q.shape[1] // len(chunks), kv_len, lengths=lengths, axis=axis)

    def _spec_of_array(self, path, leaf, *, heads):
        """Arrays of the attention are [heads, ...] (or of KV heads), or the same for all heads."""
        shape = jnp.shape(leaf)
        if shape in ((), (1,)) or self.head_devices == 1:
            return PartitionSpec()
        if shape[0] in heads:
            return PartitionSpec(self.heads_axis)
        raise ValueError(
            f"`attention{jax.tree_util.keystr(path)}` has shape {shape}: an array that is split "
            f"with the heads must begin with an axis of one of {sorted(heads)}"
        )

    def check_prompt_split(self) -> None:
        """Raises ValueError where prompts are to be split and the attention cannot do so."""
        if self.prompt_devices > 1 and (reason := why_not_by_parts(self.attention)):
            raise ValueError(
                f"{reason}, so prompts cannot be split over the mesh axis {self.sequence_axis!r}; "
                "split heads alone"
            )

    def _check(self, q, k, q_offset):
        """Raises ValueError where heads, prompt or attention cannot be split."""
        devices, parts = self.head_devices, self.prompt_devices
        for name, x in (("query", q), ("KV", k)):
            fewer = name == "KV" and devices % x.shape[2] == 0
            if x.shape[2] % devices and not fewer:
                raise ValueError(
                    f"{x.shape[2]} {name} heads cannot be split over the {devices} devices of the "
                    f"mesh axis {self.heads_axis!r}; take a divisor of {x.shape[2]} devices"
                )
        if isinstance(self.attention, IndexedAttention) and devices * parts > 1:
            raise ValueError("an IndexedAttention cannot be split: its index is that of one device")
        layout = getattr(self.attention, "layout", None)
        if getattr(layout, "shared", False) and k.shape[2] < devices:
            raise ValueError(
                f"query heads that share a list lie on several devices: {k.shape[2]} KV heads on "
                f"{devices} devices; take at most {k.shape[2]}, or `Layout(shared=False)`"
            )
        if parts == 1:
            return
        self.check_prompt_split()
        if q.shape[1] != k.shape[1] or q_offset is not None:
            raise ValueError(
                f"only whole prompts are split over the mesh axis {self.sequence_axis!r}, got "
                f"{q.shape[1]} queries for {k.shape[1]} keys, `q_offset` {q_offset}: prefill "
                "without chunks (leave out `chunk_size`)"
            )
        if q.shape[1] % (2 * parts * self.block_q):
            raise ValueError(
                f"{q.shape[1]} rows do not make {2 * parts} chunks of whole query tiles of "
                f"{self.block_q}; pad them to `padded_length(length, {parts}, {self.block_q})`"
            )


def _decided(attention, q, k):
    """The attention, with what depends on a layer's whole prompt and all heads decided."""
    if isinstance(attention, SparseAttention):
        if fallback.too_short(q.shape[1], k.shape[1], attention.keys_to_break_even()):
            return DenseAttention(
                block_q=attention.block_q, implementation=attention.implementation
            )
        return _decided_sparse(attention, q.shape[1], k.shape[1])
    if isinstance(attention, StaticAttention):
        sparse = _decided_sparse(attention.sparse, q.shape[1], k.shape[1])
        return dataclasses.replace(attention, sparse=sparse)
    if isinstance(attention, AdaptiveAttention):
        return _decided_adaptive(attention, q, k)
    return attention


def _decided_sparse(attention, q_len, kv_len):
    """The patterns, all dense where they do not pay."""
    break_even, patterns = attention.keys_to_break_even(), attention.patterns
    if fallback.in_doubt(q_len, kv_len, break_even):
        pays = fallback.pays(patterns, q_len, kv_len, break_even)
        kind = jnp.where(pays, patterns.kind, Kind.DENSE)
        patterns = dataclasses.replace(patterns, kind=kind)
    return dataclasses.replace(attention, patterns=patterns, break_even=0)


def _decided_adaptive(attention, q, k):
    """Dense where the prompt is too short for an estimate: its chunks, of fewer pairs, would be."""
    break_even = attention.keys_to_break_even(*q.shape[2:])
    if fallback.too_short(q.shape[1], k.shape[1], break_even):
        return DenseAttention(implementation=attention.implementation)
    return dataclasses.replace(attention, break_even=0)


def _count(chunks, rows, kv_len, *, lengths, axis):
    """The pairs of some consecutive queries in each chunk, over the devices of a prompt."""
    counts = [
        _count_chunk(index, rows, kv_len, lengths=lengths, q_offset=offset)
        for _, index, offset in chunks
    ]
    pairs = jax.tree.map(lambda *x: sum(x), *counts)
    return pairs if axis is None else jax.lax.psum(pairs, axis)


def _executed(chunks, rows, kv_len, *, lengths, axis):
    """What the kernel computes of each chunk, one after the other."""
    found = [Executed.of(index) for _, index, _ in chunks]
    return found[0]._replace(count=jnp.concatenate([x.count for x in found], axis=2))


def _count_chunk(index, q_len, kv_len, *, lengths, q_offset):
    """The pairs of some consecutive queries."""
    visited, causal = index.visited_pairs(q_len, kv_len, lengths=lengths, q_offset=q_offset)
    if isinstance(index, CountedPairs):
        executed = index.executed
    else:
        first = q_offset + jnp.arange(num_q_blocks(q_len, index.block_q)) * index.block_q
        tiles = jnp.sum(fallback.executed_by(index, first, lengths), axis=2)
        executed = tiles.astype(jnp.float32) * (index.block_q * index.block_kv)
    return CountedPairs(visited=visited, causal=causal, executed=executed)
