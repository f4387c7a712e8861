"""A model on several devices reads, keeps and generates what it does on one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.sharding import attention_mesh
from models import LoadError, load_model, save_checkpoint, shard_params
from models.common import layers
from models.common.cache import KVCache
from models.common.capture import read_hidden
from models.common.decoder import extend, forward, prefill
from models.common.generate import decode_greedily
from models.common.passes import run_decode_step
from models.common.weights.table import flatten_paths
from tests.models.checkpoints import golden, write_hf
from tests.models.tiny import CONFIG, random_tokens, tiny_params

# 52 words: four devices can share them.
MODEL = dataclasses.replace(CONFIG, vocab_size=52, num_layers=2)
TOKENS, LENGTHS = random_tokens(2, 50), jnp.array([50, 31], jnp.int32)
DENSE = mj.DenseAttention(8, 8, "reference")


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


@jax.jit
def answer(params, attention):
    """Logits, cache and density of the prompts, and what is generated after them."""
    logits, cache, pairs = read(params, attention, observe=mj.observe_density)
    found, _ = decode_greedily(params, logits, cache, 5, config=MODEL, max_new_tokens=5)
    return logits, cache, pairs, found.tokens


@functools.cache
def on_one_device():
    return answer(tiny_params(MODEL), DENSE)


def check_answer(found, want):
    close(found[0], want[0])
    check_cache(found[1], want[1])
    jax.tree.map(np.testing.assert_array_equal, found[2:], want[2:])


@pytest.mark.parametrize(("heads", "sequence"), [(4, 1), (1, 2)])
def test_prompts_of_several_lengths_are_answered_as_on_one_device(heads, sequence):
    params, attention = spread(DENSE, heads, sequence)
    found = answer(params, attention)
    check_answer(found, on_one_device())
    cache = found[1]
    # The cache stays where it is while a token is added to it.
    step = run_decode_step.lower(params, TOKENS[:, 0], cache, config=MODEL).compile()
    assert "all-reduce" in step.as_text()
    assert "all-gather" not in step.as_text()
    cache = step(params, TOKENS[:, 0], cache)[1]
    # Four devices have two KV heads: all of them.
    assert cache.keys.addressable_shards[0].data.shape[2:4] == (cache.capacity // sequence, 2)
    assert cache.capacity == (54 if sequence == 1 else 64)


def test_devices_of_a_prompt_exchange_keys_and_values_alone(monkeypatch):
    # Each device takes several slices of its own rows, the last one shorter.
    monkeypatch.setattr(layers, "TOKENS_PER_CHUNK", 2 * 15)
    params, attention = spread(DENSE, 2, 2)
    program = answer.lower(params, attention).compile()
    found = program(params, attention)
    check_answer(found, on_one_device())
    assert found[1].keys.addressable_shards[0].data.shape[2:4] == (32, 1)

    collective = r"= .*?\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    moved = {(kind, shape) for shape, kind in re.findall(collective, program.as_text())}
    keys = ("all-gather", "2,64,1,8")  # of the device's one KV head
    assert keys in moved
    # Nothing else is of all 64 rows; sums over the devices of the heads are of a device's own.
    assert [x for x in moved if "64" in x[1].split(",")] == [keys]
    assert ("all-reduce", "2,32,32") in moved
    # Besides, logits are gathered, and of each part of the vocabulary the likeliest new word.
    gathered = {shape for kind, shape in moved if kind == "all-gather"}
    assert gathered == {keys[1], "2,52", "2,2"}
    assert {kind for kind, _ in moved} == {"all-gather", "all-reduce"}


def test_heads_are_split_in_chunks_of_a_prompt_too():
    want, want_cache, *_ = on_one_device()
    logits, cache = read(*spread(DENSE, 2, 1), chunk_size=20)
    close(logits, want)
    check_cache(cache, want_cache)
    assert cache.keys.addressable_shards[0].data.shape[3] == 1


def test_parameters_are_read_shard_by_shard(tmp_path):
    config, tensors, _ = golden("llama-gqa")
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
    whole = load_model(tmp_path / "hf", dtype=jnp.float32)
    for found in (model, restored):
        jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)

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
    cache = KVCache(
        *[jnp.zeros((2, 1, 60, 2, 8))] * 2, jnp.zeros((2, 1), int), *[jnp.zeros(1, int)] * 2
    )
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
