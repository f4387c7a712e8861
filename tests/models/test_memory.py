"""The estimate of a prefill's memory, against what XLA says of the compiled program."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import minference_jax as mj
from minference_jax.kv_cache import StreamingKV
from minference_jax.sharding import attention_mesh
from models.common.decoder import abstract_params
from models.common.memory import (
    PrefillMemory,
    check_fits,
    compiled_bytes,
    estimate_prefill,
    num_bytes,
)
from models.common.passes import run_prefill
from models.common.weights.sharding import placed
from models.common.weights.table import flatten_paths, unflatten_paths
from tests.models.tiny import CONFIG

SIZES = {"embed_dim": 128, "hidden_dim": 448, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32}
WIDE = dataclasses.replace(CONFIG, **SIZES, vocab_size=1000, max_position=1 << 20)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeedsAll:
    """In place of attention: reads q, k and v, and writes its output elsewhere, at no cost."""

    scale: jax.Array

    def __call__(self, q, k, v, *, lengths=None, q_offset=None):
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        return q[:, ::-1] * (self.scale + k[0, -1, 0, 0] + v[0, -1, 0, 0])


@pytest.mark.parametrize(
    ("batch", "length", "how"),
    [
        pytest.param(1, 32_768, {}, id="whole"),
        pytest.param(2, 16_384, {"compression": StreamingKV(4, 60)}, id="compressed"),
        pytest.param(1, 32_768, {"chunk_size": 8_192}, id="chunks"),
    ],
)
def test_estimate_is_within_a_tenth_of_what_xla_allocates(batch, length, how):
    how = {"chunk_size": None, "compression": None} | how
    params = abstract_params(WIDE, jnp.float32)
    attention = NeedsAll(jax.ShapeDtypeStruct((3,), jnp.float32))
    capacity = 64 if how["compression"] else length

    def read(params, tokens, attention):
        rows = jnp.full((batch,), length, jnp.int32)
        return run_prefill(
            params, tokens, None, rows, config=WIDE, attention_fn=attention, capacity=capacity,
            observe=None, **how,
        )[:2]  # fmt: skip

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    used = jax.jit(read).lower(params, tokens, attention).compile().memory_analysis()
    want = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    found = estimate_prefill(
        params, config=WIDE, attention_fn=attention, batch=batch, length=length, **how
    )
    assert abs(found.peak / want - 1) < 0.1
    assert found.weights == num_bytes(params)
    assert abs(found.cache / (2 * 3 * batch * capacity * 32 * 4) - 1) < 0.01


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NeedsAllOfAPart(mj.DenseAttention):
    """As `NeedsAll`, of prompts on several devices."""

    def attend(self, q, k, v, *, lengths=None, q_offset=None):
        return NeedsAll(1.0)(q, k, v), None


def test_the_estimate_for_each_device_of_a_mesh():
    """Four KV heads on two devices, half of a prompt on each of two."""
    config, length = dataclasses.replace(WIDE, num_kv_heads=4), 65_536
    mesh = attention_mesh(heads=2, sequence=2)
    leaves = flatten_paths(abstract_params(config, jnp.float32))
    params = unflatten_paths({path: placed(path, leaf, mesh) for path, leaf in leaves.items()})
    attention = mj.ShardedAttention(NeedsAllOfAPart(), mesh)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    read = lambda params, tokens, attention: run_prefill(
        params, tokens, None, jnp.array([length]), config=config, attention_fn=attention,
        capacity=length, chunk_size=None, observe=None,
    )[:2]  # fmt: skip
    want = compiled_bytes(jax.jit(read).lower(params, tokens, attention).compile())
    how = {"config": config, "batch": 1, "length": length}
    found = estimate_prefill(params, attention_fn=attention, **how)
    assert abs(found.peak / want - 1) < 0.1
    counts = found.cache - 2 * 3 * (length // 2) * 2 * 32 * 4
    assert 0 <= counts < 100
    # Devices that there are not.
    imagined = AbstractMesh((2, 2), ("context", "model"))
    other = estimate_prefill(
        params, attention_fn=mj.ShardedAttention(attention.attention, imagined), **how
    )
    assert other == found


def test_a_million_tokens_of_an_8b_model():
    sizes = {"embed_dim": 4096, "hidden_dim": 14336, "num_layers": 32, "num_heads": 32}
    heads = {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position": 1 << 20}
    rope = dataclasses.replace(CONFIG.rope, rotary_dim=128)
    config = dataclasses.replace(CONFIG, **sizes, **heads, rope=rope, qkv_bias=False)
    of_8b = {"config": config, "batch": 1, "length": 1 << 20}
    params = abstract_params(config, jnp.bfloat16)
    dense = estimate_prefill(params, attention_fn=mj.DenseAttention(), **of_8b)
    assert round(dense.cache / 2**30) == 128
    # Compiled for an H200 with a cache of 1024 keys: 43.9 GiB beside the cache.
    assert (dense.peak - dense.cache) / 2**30 == pytest.approx(43.9, rel=0.01)


def test_what_cannot_fit_is_told_with_the_ways_out(as_users_see_it):
    memory = PrefillMemory(15, 128, 9, 12, 8, 1, 1, 1, 0)._asdict()
    memory = PrefillMemory(**{name: size << 30 for name, size in memory.items()})
    check_fits(memory, None)
    check_fits(memory, memory.peak)
    with pytest.raises(MemoryError, match=r"174\.0 GiB .*weights 15\.0, cache 128\.0.* 105\.0 GiB"):
        check_fits(memory, 105 << 30)
