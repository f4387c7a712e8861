"""Device memory that a prefill needs, told before anything is on the device.

Sizes of weights, cache and index are those of the arrays themselves, by `jax.eval_shape`; what
lives inside a layer follows from how `models.common.layers` computes it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minference_jax.kv_cache import KVCompression
from minference_jax.types import AttentionFn
from models.common.cache import kept_tokens
from models.common.checks import check_mesh
from models.common.config import DecoderConfig
from models.common.layers import TOKENS_PER_CHUNK
from models.common.passes import run_prefill
from models.common.placement import Placement
from models.common.stack import Params
from models.common.weights.sharding import split_axis
from models.common.weights.table import flatten_paths


class PrefillMemory(NamedTuple):
    """Bytes of each part of a prefill on a device; `peak` is the most that exists at once.

    Attributes:
        weights: the parameters.
        cache: keys and values of all layers, as they are kept.
        stream: residual stream and rotary tables of the tokens read at once.
        qkv: queries, keys and values of one layer. In a prompt read in chunks, keys and values are
            a copy of the layer's cache; of a prompt on several devices, those of all of them come
            together, and exist twice while they are put in order.
        output: of one layer's attention.
        index: of one layer's attention: what it visits.
        layer: what the loop over layers copies: parameters of one layer, and what a compression
            keeps of it.
        chunk: MLP of the rows computed at once.
        logits: of the last token, float32.
    """

    weights: int
    cache: int
    stream: int
    qkv: int
    output: int
    index: int
    layer: int
    chunk: int
    logits: int

    @property
    def peak(self) -> int:
        """The most bytes at once: while attention runs, or while the MLP does after it."""
        lasting = self.weights + self.cache + self.stream + self.layer + self.logits
        return lasting + self.output + max(self.qkv + self.index, self.chunk)


def estimate_prefill(
    params: Params,
    *,
    config: DecoderConfig,
    attention_fn: AttentionFn,
    batch: int,
    length: int,
    new_tokens: int = 0,
    chunk_size: int | None = None,
    compression: KVCompression | None = None,
) -> PrefillMemory:
    """Estimates the memory of `models.common.decoder.prefill` on each device; computes nothing.

    What an attention needs beside its index (gathered columns, scores while it is estimated) is not
    counted, nor is what `observe` returns. An index is counted as if each device of a prompt found
    that of the whole prompt for its heads: it is smaller where it is made of blocks. Compiled
    programs can be asked for everything: `compiled.memory_analysis()`.

    Args:
        params: the parameters, or their shapes (`abstract_params`).
        config: the model's hyper-parameters.
        attention_fn: as in `prefill`; the mesh of a `ShardedAttention` may be a
            `jax.sharding.AbstractMesh`, of devices that there are not.
        batch: prompts read together.
        length: tokens of each, padding included.
        new_tokens: room in the cache for tokens after the prompt.
        chunk_size: prompt tokens read at once, all if None.
        compression: as in `prefill`.
    """
    place = Placement.of(attention_fn)
    heads_on = 1 if place.attention is None else place.attention.head_devices
    if place.attention is not None:
        whole = chunk_size is None or chunk_size >= length
        check_mesh(attention_fn, None, config, whole=whole, what="a prefill in chunks")
        attention_fn = place.attention.attention
    capacity = kept_tokens(compression, length) + new_tokens
    cache, index, logits = _shapes(
        params, config=config, attention_fn=attention_fn, batch=batch, length=length,
        capacity=place.capacity(capacity, compression, length), chunk_size=chunk_size,
        compression=compression,
    )  # fmt: skip
    length = place.padded(length)
    at_once = length // place.parts if chunk_size is None else min(chunk_size, length)
    steps = config.num_layers * (1 if chunk_size is None else -(-length // at_once))
    own_kv_heads = max(1, config.num_kv_heads // heads_on)
    kv_heads = config.num_kv_heads if config.num_kv_heads < heads_on else own_kv_heads
    cached = num_bytes(cache) * kv_heads // config.num_kv_heads // place.parts
    weights, of_layers = (
        _weights(part, heads_on) for part in (params, {"layers": params["layers"]})
    )
    size = jnp.dtype(params["embed"]["embedding"].dtype).itemsize
    row = config.head_dim * size * batch
    keys = length if chunk_size is not None and at_once < length else at_once
    gathered = 2 * 2 * own_kv_heads * length * row if place.parts > 1 else 0
    chunk = min(TOKENS_PER_CHUNK, batch * at_once)
    return PrefillMemory(
        weights=weights,
        cache=cached,
        stream=batch * at_once * (config.embed_dim * size + 4 * config.rope.rotary_dim),
        qkv=(config.num_heads // heads_on * at_once + 2 * kv_heads * keys) * row + gathered,
        output=config.num_heads // heads_on * at_once * row,
        index=num_bytes(index) // steps // heads_on,
        layer=(of_layers + (0 if compression is None else cached)) // config.num_layers,
        chunk=chunk * size * (3 * config.hidden_dim // heads_on + config.embed_dim),
        logits=num_bytes(logits),
    )


def _shapes(
    params, *, config, attention_fn, batch, length, capacity, chunk_size, compression
) -> tuple[Any, Any, Any]:
    """Cache, index and logits of a prefill on one device, as shapes."""
    read = functools.partial(
        run_prefill, config=config, capacity=capacity, chunk_size=chunk_size, observe=_observe_index
    )
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    logits, cache, index = jax.eval_shape(
        lambda params, tokens, rows, attention, compression: read(
            params, tokens, None, rows, attention_fn=attention, compression=compression
        ),
        params, tokens, rows, attention_fn, compression,
    )  # fmt: skip
    return cache, index, logits


def _weights(params: Params, devices: int) -> int:
    """Bytes of a device's part of the parameters."""
    parts = [
        num_bytes(leaf) // (1 if split_axis(path, leaf.shape, devices) is None else devices)
        for path, leaf in flatten_paths(params).items()
    ]
    return sum(parts)


def device_memory() -> int | None:
    """Bytes that JAX may use of the default device; None where it has no limit, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("bytes_limit")


WAYS_OUT = (
    "keep less of the prompt or in fewer bits (`compression`), read fewer tokens at once "
    "(`chunk_size`) or fewer prompts, or load the model in bfloat16"
)


def check_fits(memory: PrefillMemory | int, limit: int | None, *, ways_out: str = WAYS_OUT) -> None:
    """Raises MemoryError, with the ways out, if a prefill needs more than `limit` bytes.

    Args:
        memory: an estimate, or what a compiled program needs.
        limit: what there is, see `device_memory`; None is no limit.
        ways_out: what to do, in words.
    """
    needed = memory if isinstance(memory, int) else memory.peak
    if limit is None or needed <= limit:
        return
    parts = ""
    if isinstance(memory, PrefillMemory):
        found = (f"{part} {gib(size)}" for part, size in memory._asdict().items())
        parts = f" ({', '.join(found)})"
    raise MemoryError(
        f"the prefill needs about {gib(needed)} GiB at once{parts}, but JAX has {gib(limit)} GiB "
        f"on this device: {ways_out}. JAX takes three quarters of a GPU unless "
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, for example 0.95"
    )


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs: what it is given, what it returns, what it holds."""
    used: Any = compiled.memory_analysis()
    held = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + held


def gib(size: int) -> str:
    """Bytes as GiB, with one decimal."""
    return f"{size / 2**30:.1f}"


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, or of their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _observe_index(attention, q, k, v, **where):
    attend = getattr(attention, "attend", None)
    return (attention(q, k, v, **where), None) if attend is None else attend(q, k, v, **where)
