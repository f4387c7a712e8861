"""A model on several devices reads, keeps and generates what it does on one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.kv_cache import EightBitKV, SnapKV
from minference_jax.sharding import attention_mesh
from models import LoadError, load_model, save_checkpoint, shard_params
from models.common import layers
from models.common.capture import read_hidden
from models.common.decoder import extend, forward, prefill
from models.common.generate import Sampling, generate
from models.common.passes import run_prefill
from models.common.weights.table import flatten_paths
from tests.models.checkpoints import golden, write_hf
from tests.models.test_load import logits_of
from tests.models.tiny import CONFIG, random_tokens, tiny_params

# 52 words: four devices can share them.
MODEL = dataclasses.replace(CONFIG, vocab_size=52, num_layers=2)
TOKENS, LENGTHS = random_tokens(2, 50), jnp.array([50, 31], jnp.int32)
ESTIMATOR = mj.WithColumns(mj.BlockThreshold(0.3, local_blocks=1, pooled_rows=4), num_columns=8)
LAYOUT = mj.Layout(block_q=8, block_kv=8, max_blocks=6)
DENSE = mj.DenseAttention(8, 8, "reference")
HYBRID = mj.AdaptiveAttention(ESTIMATOR, LAYOUT, "reference", break_even=0).for_layers(2)


def spread(attention, heads, sequence):
    """The parameters and the attention on a mesh."""
    devices = jax.devices()[: heads * sequence]
    mesh = attention_mesh(heads=heads, sequence=sequence, devices=devices)
    return shard_params(tiny_params(MODEL), mesh), mj.ShardedAttention(attention, mesh)


def read(params, attention, **how):
    how = {"config": MODEL, "attention_fn": attention, "lengths": LENGTHS, "capacity": 54} | how
    return prefill(params, TOKENS, **how)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def check_cache(cache, want):
    cache, want = jax.tree.map(np.asarray, (cache, want))
    np.testing.assert_array_equal(cache.stored, want.stored)
    np.testing.assert_array_equal(cache.lengths, want.lengths)
    jax.tree.map(close, cache.scales, want.scales)
    for layer, row in np.ndindex(*cache.stored.shape):
        real = np.s_[layer, row, : want.stored[layer, row]]
        close(cache.keys[real].astype(np.float32), want.keys[real].astype(np.float32))
        close(cache.values[real].astype(np.float32), want.values[real].astype(np.float32))


KEPT = EightBitKV(SnapKV(budget=12, window=4))


@functools.cache
def on_one_device(compression):
    return read(tiny_params(MODEL), DENSE, observe=mj.observe_density, compression=compression)


@pytest.mark.parametrize(
    ("heads", "sequence", "compression"), [(4, 1, KEPT), (1, 2, None), (2, 2, KEPT)]
)
def test_prompts_of_several_lengths_are_read_as_on_one_device(heads, sequence, compression):
    want, want_cache, want_pairs = on_one_device(compression)
    logits, cache, pairs = read(
        *spread(DENSE, heads, sequence), observe=mj.observe_density, compression=compression
    )
    close(logits, want)
    check_cache(cache, want_cache)
    jax.tree.map(np.testing.assert_array_equal, pairs, want_pairs)
    shape = cache.keys.addressable_shards[0].data.shape
    assert shape[2:4] == (cache.capacity // sequence, 1 if heads == 2 else 2)
    assert cache.capacity == (64 if compression is None else 54)


def test_heads_are_split_in_chunks_of_a_prompt_too():
    want, want_cache, _ = on_one_device(None)
    logits, cache = read(*spread(DENSE, 2, 1), chunk_size=20)
    close(logits, want)
    check_cache(cache, want_cache)
    assert cache.keys.addressable_shards[0].data.shape[3] == 1


@pytest.mark.parametrize(("heads", "sequence"), [(4, 1), (2, 2)])
def test_prompts_are_continued_as_on_one_device(heads, sequence):
    how = {"config": MODEL, "max_new_tokens": 6, "sampling": Sampling(), "lengths": LENGTHS}
    params, attention = spread(DENSE, heads, sequence)
    want = generate(tiny_params(MODEL), TOKENS, attention_fn=DENSE, **how)
    got = generate(params, TOKENS, attention_fn=attention, **how)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_devices_of_a_prompt_exchange_keys_values_and_the_last_queries(monkeypatch):
    # Each device takes several slices of its own rows, the last one shorter.
    monkeypatch.setattr(layers, "TOKENS_PER_CHUNK", 30)
    prompt, length = random_tokens(1, 120), jnp.array([120])
    run = jax.jit(
        lambda params, attention: run_prefill(
            params, prompt, None, length, config=MODEL, attention_fn=attention, capacity=130,
            chunk_size=None, observe=None,
        )
    )  # fmt: skip
    want, want_cache, _ = run(tiny_params(MODEL), HYBRID)
    params, attention = spread(HYBRID, 2, 2)
    program = run.lower(params, attention).compile()
    logits, cache, _ = program(params, attention)
    close(logits, want)
    check_cache(cache, want_cache)

    collective = r"= (.*?)\{.*?\}? (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    moved = {(kind, shape) for shape, kind in re.findall(collective, program.as_text())}
    last_queries, rows, last_rows = "f32[1,64,2,8]", "f32[1,1,30,32]", "f32[1,1,4,32]"
    embedded = "f32[1,64,32]"
    assert moved == {
        ("all-gather", "f32[1,128,1,8]"),  # keys and values of the device's one KV head
        ("all-reduce", last_queries),
        # Between the devices of the heads, of their own 64 of 128 rows:
        *(("all-reduce", shape) for shape in (embedded, rows, last_rows)),
        ("all-reduce", "f32[1,32]"),  # the last row, from the device that has it
        ("all-gather", "f32[1,52]"),  # its logits
    }


def test_parameters_are_read_shard_by_shard(tmp_path):
    config, tensors, case = golden("llama-gqa")
    mesh = attention_mesh(heads=2, sequence=2)
    model = load_model(write_hf(tmp_path / "hf", config, tensors), dtype=jnp.float32, mesh=mesh)
    save_checkpoint(
        tmp_path / "saved", config=model.config, params=model.params, tokenizer=model.tokenizer
    )
    restored = load_model(tmp_path / "saved", dtype=jnp.float32, mesh=mesh)
    for found in (model, restored):
        flat = flatten_paths(found.params)
        assert all(len(leaf.addressable_shards) == 4 for leaf in flat.values())
        sizes = {name: leaf.addressable_shards[3].data.shape for name, leaf in flat.items()}
        whole = {name: leaf.shape for name, leaf in flat.items()}
        halved = {name: whole[name] for name in whole if sizes[name] != whole[name]}
        assert len(halved) == 9
        for name, shape in halved.items():
            assert np.prod(shape) == 2 * np.prod(sizes[name]), name
    jax.tree.map(np.testing.assert_array_equal, restored.params, model.params)
    close(logits_of(restored, case["tokens"]), case["logits"])

    lost, *_ = sorted((tmp_path / "saved/params").glob("**/d/*"))
    lost.unlink()
    with pytest.raises(LoadError, match=rf"{lost.name} \(1 of \d+ files\) lost .* save it again"):
        load_model(tmp_path / "saved", dtype=jnp.float32, mesh=mesh)


@pytest.mark.parametrize(
    ("change", "devices", "attention", "how", "message"),
    [
        ({"num_heads": 6}, (4, 1), DENSE, {}, "4 devices .* 6 query heads; .* over 1 or 2 "),
        ({"num_heads": 6, "num_kv_heads": 6}, (4, 1), DENSE, {}, "6 query heads, 6 KV heads"),
        ({"hidden_dim": 50}, (4, 1), DENSE, {}, "50 MLP columns; split it over 1 or 2 "),
        ({"vocab_size": 55}, (2, 1), DENSE, {}, "55 words of the vocabulary; split it over 1 "),
        ({}, (1, 2), DENSE, {"chunk_size": 16}, "a prefill in chunks cannot run .* 2 devices"),
        ({}, (1, 2), mj.TopKAttention(4), {}, "TopKAttention needs .* split heads alone"),
    ],
)
def test_what_cannot_be_split_is_told_before_anything_runs(
    change, devices, attention, how, message, as_users_see_it
):
    params, attention = spread(attention, *devices)
    with pytest.raises(ValueError, match=message):
        read(params, attention, config=dataclasses.replace(MODEL, **change), **how)


def test_passes_that_cannot_split_prompts_say_so(as_users_see_it):
    params, attention = spread(DENSE, 1, 2)
    how = {"config": MODEL, "attention_fn": attention}
    rows = {"rows": 4, "capacity": 50, "observe": mj.observe_density}
    _, cache = prefill(tiny_params(MODEL), TOKENS[:1], config=MODEL, attention_fn=DENSE, capacity=60)
    for name, call in {
        "`forward`": lambda: forward(params, TOKENS, **how),
        "`read_hidden`": lambda: read_hidden(
            params, TOKENS, lengths=LENGTHS, rope_length=LENGTHS, **rows, **how
        ),
        "`extend`": lambda: extend(params, TOKENS[:1, :4], cache, **how),
    }.items():
        with pytest.raises(ValueError, match=f"{name} cannot run with prompts split"):
            call()


def test_parameters_elsewhere_and_too_few_devices(tmp_path, as_users_see_it):
    _, attention = spread(DENSE, 2, 1)
    with pytest.raises(ValueError, match=r"are on 1 device.*mesh has 2.*shard_params"):
        read(tiny_params(MODEL), attention)
    with pytest.raises(ValueError, match=r"2 x 4 devices .* needs 8, there are 4"):
        attention_mesh(heads=4, sequence=2)
    config, tensors, _ = golden("llama-gqa")
    mesh = attention_mesh(heads=3, devices=jax.devices()[:3])
    with pytest.raises(ValueError, match="3 devices cannot share the model evenly"):
        load_model(write_hf(tmp_path, config, tensors), mesh=mesh)
