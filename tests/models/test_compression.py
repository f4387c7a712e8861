"""Prefill with a compressed cache, and decoding on it."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.kv_cache import DropKV, EightBitKV, PyramidKV, SnapKV, StreamingKV
from models.common.cache import attend_cached
from models.common.capture import capture_qkv
from models.common.decoder import abstract_params, decode_step, forward, prefill
from models.common.generate import generate
from models.common.passes import run_prefill
from models.common.sampling import Sampling
from tests.helpers import masked_attention
from tests.models.tiny import CONFIG, ScaledQueries, random_tokens, tiny_params

DENSE = mj.DenseAttention()
S, LENGTHS = 21, [21, 13, 6]
SIZES = {"budget": 9, "window": 3, "kernel_size": 3}
TOKENS, NEW = random_tokens(3, S), random_tokens(3, 3, seed=5)
SNAP, STREAMING = SnapKV(**SIZES), StreamingKV(2, 7)
PYRAMID = PyramidKV.for_layers(3, **SIZES, beta=3)


def read(**kwargs):
    return prefill(
        tiny_params(), TOKENS, config=CONFIG, attention_fn=DENSE,
        lengths=jnp.array(LENGTHS, jnp.int32), **kwargs,
    )  # fmt: skip


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """Dense attention over a mask of its own: `[layers, batch, kv_heads, s, s]`."""

    mask: jax.Array

    def __call__(self, q, k, v, *, lengths=None, q_offset=None):
        k, v, mask = (
            jnp.repeat(x, q.shape[2] // k.shape[2], axis=axis)
            for x, axis in ((k, 2), (v, 2), (self.mask, 1))
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize(
    ("compression", "budgets"),
    [
        pytest.param(SNAP, [9, 9, 9], id="snapkv"),
        pytest.param(STREAMING, [9, 9, 9], id="streaming"),
        pytest.param(PYRAMID, [13, 9, 5], id="pyramidkv"),
    ],
)
def test_decoding_is_masked_dense_attention_over_the_kept_keys(compression, budgets):
    want_logits, whole, qkv = read(observe=capture_qkv)
    logits, cache = read(capacity=compression.capacity + 3, compression=compression)
    np.testing.assert_array_equal(logits, want_logits)
    assert cache.keys.shape == (3, 3, compression.capacity + 3, 2, 8)
    # Layers of a pyramid share a short row's budget equally: they keep all of the 6 tokens.
    stored = [[min(n, budget if n > 9 else 9) for n in LENGTHS] for budget in budgets]
    assert cache.stored.tolist() == stored

    # Rows: the prompt's real tokens, the new ones, padding. New tokens see what was kept.
    total, lengths = S + 3, np.array(LENGTHS)
    tokens = np.zeros((3, total), np.int32)
    mask = np.broadcast_to(np.tri(total, dtype=bool), (3, 3, 2, total, total)).copy()
    for layer, row, head in np.ndindex(3, 3, 2):
        n = lengths[row]
        tokens[row, : n + 3] = [*TOKENS[row, :n], *NEW[row]]
        kept = np.asarray(cache.keys[layer, row, : stored[layer][row], head])
        at = (kept[:, None] == np.asarray(whole.keys[layer, row, None, :n, head])).all(-1)
        assert np.all(at.sum(axis=1) == 1)
        mask[layer, row, head, n:, :n] &= at.any(axis=0)
        own = jax.tree.map(lambda x, i=layer: x[i], compression)
    want = forward(
        tiny_params(), jnp.asarray(tokens), config=CONFIG, attention_fn=Masked(jnp.asarray(mask)),
        rope_length=jnp.asarray(lengths, jnp.int32),
    )  # fmt: skip
    for step in range(3):
        logits, cache = decode_step(tiny_params(), NEW[:, step], cache, config=CONFIG)
        got = [want[row, n + step] for row, n in enumerate(LENGTHS)]
        np.testing.assert_allclose(logits, got, atol=2e-5, rtol=0)
    assert cache.lengths.tolist() == [n + 3 for n in LENGTHS]
    with pytest.raises(ValueError, match=f"capacity is {compression.capacity + 3}"):
        decode_step(tiny_params(), NEW[:, 0], cache, config=CONFIG)

    # Every layer's choice is that of its own queries and keys.
    kept = jax.jit(own)(*(x[2] for x in qkv), lengths=jnp.asarray(lengths, jnp.int32))
    for row, n in enumerate(stored[2]):
        np.testing.assert_allclose(kept.keys[row, :n], cache.keys[2, row, :n], atol=1e-6, rtol=0)


def test_generation_goes_on_from_what_is_kept():
    logits, cache = read(capacity=12, compression=EightBitKV(SNAP))
    want = []
    for _ in range(3):
        want.append(jnp.argmax(logits, axis=-1))
        logits, cache = decode_step(tiny_params(), want[-1], cache, config=CONFIG)
    result = generate(
        tiny_params(), TOKENS, config=CONFIG, attention_fn=DENSE, max_new_tokens=3,
        sampling=Sampling(), lengths=jnp.array(LENGTHS, jnp.int32), compression=EightBitKV(SNAP),
        chunk_size=S,
    )  # fmt: skip
    np.testing.assert_array_equal(result.tokens, np.stack(want, axis=1))


def relative_error(got, want):
    return np.sqrt(np.mean((np.asarray(got, np.float32) - want) ** 2) / np.mean(np.square(want)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_8_bits_change_the_next_logits_no_more_than_numbers_are_rounded(dtype):
    _, whole = read(capacity=S + 1)
    _, small = read(capacity=S + 1, compression=EightBitKV(dtype=dtype))
    assert small.keys.dtype == small.values.dtype == dtype
    want, got = (
        decode_step(tiny_params(), NEW[:, 0], cache, config=CONFIG)[0] for cache in (whole, small)
    )
    real = np.arange(S + 1)[None, :] < np.array(LENGTHS)[:, None]
    back = np.asarray(small.keys, np.float32) * np.asarray(small.scales.keys)[:, :, None]
    rounding = relative_error(back[:, real], np.asarray(whole.keys)[:, real])
    assert 0.005 < rounding < 0.03
    assert 0 < relative_error(got, want) < rounding


def test_decoding_reads_8_bits_as_the_numbers_that_they_stand_for():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 8)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 9, 2, 8)), jnp.float32)
    lengths = jnp.array([9, 5], jnp.int32)
    kept = EightBitKV()(jnp.broadcast_to(q, (2, 9, 4, 8)), 5 * k, 30 * v, lengths=lengths)
    back = [
        np.asarray(x, np.float32) * np.asarray(scale)[:, None]
        for x, scale in zip(kept[:2], kept.scales, strict=True)
    ]
    got = attend_cached(q, kept.keys, kept.values, lengths, kept.scales)
    mask = (np.arange(9) < np.array([[9], [5]]))[:, None, None, :]
    want = masked_attention(np.asarray(q), *back, np.broadcast_to(mask, (2, 4, 1, 9)))
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


def test_the_whole_cache_of_all_layers_never_exists():
    length = 16_384

    config = dataclasses.replace(CONFIG, num_layers=6, max_position=1 << 20)
    shapes = abstract_params(config, jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def bytes_needed(compression):
        lowered = jax.jit(
            lambda params, tokens: run_prefill(
                params, tokens, None, jnp.array([length]), config=config, observe=None,
                attention_fn=ScaledQueries(jnp.ones(6)), chunk_size=None,
                capacity=length if compression is None else 64, compression=compression,
            )[:2]
        ).lower(*shapes)  # fmt: skip
        used = lowered.compile().memory_analysis()
        return used.temp_size_in_bytes + used.output_size_in_bytes

    of_a_layer = 2 * length * 2 * 8 * 4
    assert bytes_needed(None) - bytes_needed(StreamingKV(4, 60)) > 5 * of_a_layer


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        pytest.param({"chunk_size": 20}, "21 tokens in chunks of 20 cannot be", id="chunks"),
        pytest.param({"capacity": 8}, r"\(8\) must be .* `compression` keeps \(9", id="capacity"),
        pytest.param(
            {"compression": PyramidKV.for_layers(2)},
            r"layer has shape \(2,\), but the model has 3 .*`PyramidKV\.for_layers\(3\)`",
            id="layers",
        ),
        pytest.param(
            {"compression": DropKV(), "capacity": 5}, "keeps nothing of the prompt", id="nothing"
        ),
    ],
)
def test_compression_that_cannot_be_is_explained(kwargs, words):
    with pytest.raises(ValueError, match=words):
        read(**{"compression": SNAP, **kwargs})
