"""Attention over several devices gives what one device gives, and moves only what it must."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import minference_jax as mj
from minference_jax.kv_cache import EightBitKV, SnapKV
from minference_jax.sharding import (
    attention_mesh,
    balanced_order,
    keep_sharded,
    natural_order,
    padded_length,
)
from models.common.weights.sharding import MODEL_AXIS
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv

LAYOUT = mj.Layout(block_q=16, block_kv=16, max_blocks=6)
# Three heads for each of two devices. The first costs 0.85 of dense attention: less than the 0.9
# from which it would be dense, but more than that (0.94) in the chunks of one of the devices.
HEADS = [
    mj.VerticalSlash(vertical_size=40, slash_size=20, sink_size=4, window_size=8),
    mj.BlockSparse(num_blocks=1),
    mj.AShape(sink_size=4, window_size=20),
    mj.TriShape(sink_size=4, window_size=20, last_size=9),
    mj.Dense(),
    mj.VerticalSlash(vertical_size=60, slash_size=20),
]


def sharded(attention, heads=1, sequence=1):
    devices = jax.devices()[: heads * sequence]
    mesh = attention_mesh(heads=heads, sequence=sequence, devices=devices)
    return mj.ShardedAttention(attention, mesh)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_balanced_order_gives_every_device_as_many_pairs(parts):
    length = padded_length(1000, parts, 8)
    assert length >= 1000 > length - 16 * parts
    order = balanced_order(length, parts)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    np.testing.assert_array_equal(order[natural_order(length, parts)], np.arange(length))
    held = order.reshape(parts, 2, -1)
    assert (np.diff(held, axis=2) == 1).all(), "a device holds two runs of rows"
    assert len(set((1 + held).sum(axis=(1, 2)))) == 1
    assert (held[:, 0, 0] % 8 == 0).all()


def test_every_pattern_is_what_one_device_computes():
    patterns = mj.HeadPatterns.from_grid([HEADS], max_columns=64, max_blocks=8)
    attention = mj.SparseAttention(patterns, 16, 16, implementation="reference").layer(0)
    q, k, v = map(jnp.asarray, random_qkv(7, batch=2, q_len=256, heads=6))
    lengths = jnp.array([250, 140])
    run = jax.jit(lambda attention, *x: attention(*x, lengths=lengths))
    want = run(attention, q, k, v)
    stored, positions = balanced_order(256, 2), natural_order(256, 2)
    got = run(sharded(attention, 2, 2), *(x[:, stored] for x in (q, k, v)))[:, positions]
    for row, length in enumerate(lengths):
        assert_attention_close(got[row : row + 1, :length], want[row : row + 1, :length])


def tiny_model(params, tokens, positions, lengths, attention):
    """The last real row of the stream behind the layers."""
    width = params["embed"].shape[1]
    angles = positions[:, None] * jnp.arange(1, width + 1)[None, :] / 50
    x = params["embed"][tokens] + jnp.sin(angles)[None]

    def layer(x, of_layer):
        weights, attention = of_layer
        q, k, v = (jnp.einsum("bse,ehd->bshd", x, weights[name]) for name in "qkv")
        out = attention(q, k, v, lengths=lengths)
        return x + jnp.einsum("bshd,hde->bse", out, weights["o"]), None

    x, _ = jax.lax.scan(layer, x, (params["layers"], attention))
    # Not an index: a row at a traced place of a split axis would gather the whole stream.
    last = positions[None, :] == lengths[:, None] - 1
    return jnp.sum(jnp.where(last[:, :, None], x, 0.0), axis=1)


def test_a_model_with_the_hybrid_moves_keys_and_values_alone():
    length, width, heads, kv_heads, head_dim = 200, 24, 4, 2, 8
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    layers = {
        "q": normal(2, width, heads, head_dim) / 5,
        "k": normal(2, width, kv_heads, head_dim) / 5,
        "v": normal(2, width, kv_heads, head_dim) / 5,
        "o": normal(2, heads, head_dim, width) / 5,
    }
    params = {"embed": normal(50, width), "layers": layers}
    tokens = rng.integers(0, 50, (1, length))
    estimator = mj.WithColumns(mj.BlockThreshold(0.3, local_blocks=1, pooled_rows=4), num_columns=8)
    hybrid = mj.AdaptiveAttention(estimator, LAYOUT, "reference", break_even=0).for_layers(2)
    run = jax.jit(tiny_model)
    want = run(params, tokens, np.arange(length), jnp.array([length]), hybrid)

    padded = padded_length(length, 2, LAYOUT.block_q)
    stored = balanced_order(padded, 2)
    attention = sharded(hybrid, 2, 2)
    mesh = attention.mesh
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    for name, at in {"q": 2, "k": 2, "v": 2, "o": 1}.items():
        layers[name] = place(layers[name], *[None] * at, "model")
    tokens = np.pad(tokens, ((0, 0), (0, padded - length)))[:, stored]
    arguments = (
        params, place(tokens, None, "context"), place(stored, "context"), jnp.array([length]),
        attention,
    )  # fmt: skip
    program = run.lower(*arguments).compile()
    assert_attention_close(program(*arguments), want)

    text = program.as_text()
    moved = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    gathered = [shape for shape, name in moved if name == "all-gather"]
    keys = f"f32[1,{padded},{kv_heads // 2},{head_dim}]"
    assert [re.sub(r"\{.*?\}", "", shape) for shape in gathered] == [keys, keys]
    assert {name for _, name in moved} == {"all-gather", "all-reduce"}
    # No device holds the queries of all rows, of its own heads or of all.
    assert f"f32[1,{padded // 2},{heads // 2},{head_dim}]" in text
    assert not re.search(rf"f32\[1,{padded},({heads}|{heads // 2}),{head_dim}\]", text)


def test_devices_that_share_a_kv_head_take_that_of_their_queries():
    q, k, v = random_qkv(4, q_len=30, kv_len=50, kv_heads=2)
    run = jax.jit(lambda attention, *x: attention(*x))
    dense = mj.DenseAttention(16, 16, "reference")
    out = run(sharded(dense, heads=4), *map(jnp.asarray, (q, k, v)))
    mask = np.broadcast_to(causal_mask(30, 50), (1, 4, 30, 50))
    assert_attention_close(out, masked_attention(q, k, v, mask))


@pytest.mark.parametrize("break_even", [100, 1000])
def test_a_layer_that_does_not_pay_is_dense_on_all_devices(break_even):
    # The heads of one device would pay; the layer does not, or the prompt is too short for any.
    local, wide = mj.AShape(sink_size=1, window_size=1), mj.AShape(sink_size=4, window_size=900)
    patterns = mj.HeadPatterns.from_grid([[local, local, wide, wide]])
    attention = mj.SparseAttention(
        patterns, 16, 16, implementation="reference", break_even=break_even
    )
    q, k, v = random_qkv(3, q_len=128, kv_heads=1)
    stored, positions = balanced_order(128, 2), natural_order(128, 2)
    observe = jax.jit(lambda *x: mj.observe_density(*x, lengths=jnp.array([100])))
    out, pairs = observe(sharded(attention.layer(0), 2, 2), *(x[:, stored] for x in (q, k, v)))
    mask = np.broadcast_to(causal_mask(128, 128), (1, 4, 128, 128))
    assert_attention_close(out[:, positions], masked_attention(q, k, v, mask), rows=100)
    np.testing.assert_array_equal(pairs.visited, np.full((1, 4), 100 * 101 / 2))
    np.testing.assert_array_equal(pairs.causal, pairs.visited)


@pytest.mark.parametrize("break_even", [100, 128])
def test_a_prompt_is_too_short_for_an_estimate_as_on_one_device(break_even):
    """128 keys; the pairs of a chunk of 32 rows are by their shape those of 85 keys."""
    attention = mj.AdaptiveAttention(
        mj.BlockThreshold(0.9, 1, 1), LAYOUT, "reference", break_even=break_even
    )
    q, k, v = map(jnp.asarray, random_qkv(3, q_len=128))
    stored = balanced_order(128, 2)
    observe = jax.jit(mj.observe_density)
    _, want = observe(attention, q, k, v)
    _, got = observe(sharded(attention, 1, 2), *(x[:, stored] for x in (q, k, v)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got.visited < got.causal).all() == (break_even < 128)


@pytest.mark.parametrize(("sequence", "kv_heads"), [(1, 2), (2, 1)])
def test_the_same_keys_are_kept_of_a_prompt_on_several_devices(sequence, kv_heads):
    q, k, v = map(jnp.asarray, random_qkv(5, batch=2, q_len=64, kv_heads=kv_heads))
    lengths, kept = jnp.array([60, 3]), EightBitKV(SnapKV(budget=12, window=4))
    want = jax.jit(kept)(q, k, v, lengths=lengths)
    attention = sharded(mj.DenseAttention(16, 16), 2, sequence)
    keep = jax.jit(
        lambda *x: keep_sharded(kept, *x, lengths=lengths, capacity=16, attention=attention)
    )
    stored = balanced_order(64, sequence)
    got = keep(*(x[:, stored] for x in (q, k, v)))
    padded = lambda x: jnp.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)))
    want = want._replace(keys=padded(want.keys), values=padded(want.values))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.keys.addressable_shards[0].data.shape == (2, 16 // sequence, 1, 16)


ONE = mj.HeadPatterns.uniform(mj.Dense(), num_layers=1, num_heads=6)
SPARSE = mj.SparseAttention(ONE, 16, 16).layer(0)


@pytest.mark.parametrize(
    ("attention", "devices", "kv_heads", "length", "message"),
    [
        (SPARSE, (4, 1), 2, 64, "6 query heads .* 4 devices"),
        (SPARSE, (2, 1), 3, 64, "3 KV heads .* 2 devices"),
        (SPARSE, (1, 2), 2, 96, "96 rows do not make 4 chunks .* of 16"),
        (mj.SparseAttention(ONE), (2, 1), 2, 64, r"\[layers, heads\]"),
        (mj.TopKAttention(4), (1, 2), 2, 64, "TopKAttention needs .* split heads alone"),
        (mj.AdaptiveAttention(mj.FlexPrefill(0.9), LAYOUT), (1, 2), 2, 64, "FlexPrefill decides"),
        (mj.AdaptiveAttention(mj.WithColumns(mj.InfLLM(), 8), LAYOUT), (1, 4), 2, 128, "InfLLM"),
        (mj.AdaptiveAttention(mj.BlockMass(jnp.zeros(5))), (2, 1), 2, 64, "is for 5 lists"),
        (
            mj.AdaptiveAttention(mj.BlockMass(0.1), mj.Layout(shared=True)),
            (2, 1), 1, 64, "share a list",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_split(attention, devices, kv_heads, length, message, as_users_see_it):
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=length, heads=6, kv_heads=kv_heads))
    with pytest.raises(ValueError, match=message):
        sharded(attention, *devices)(q, k, v)


def test_chunks_of_a_prompt_cannot_be_split(as_users_see_it):
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=64, heads=6))
    with pytest.raises(ValueError, match=r"only whole prompts .* `q_offset` 0"):
        sharded(SPARSE, 1, 2)(q, k, v, q_offset=0)


def test_axes_of_the_mesh():
    assert attention_mesh(heads=2, devices=jax.devices()[:2]).axis_names[1] == MODEL_AXIS
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with pytest.raises(ValueError, match="none is 'context'"):
        mj.ShardedAttention(SPARSE, mesh)
    with pytest.raises(ValueError, match="axis 'data' would all compute the same"):
        mj.ShardedAttention(SPARSE, mesh, sequence_axis=None)
