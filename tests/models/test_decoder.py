"""The decoder against itself: cache, chunks, batches, padding, memory, compiling, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from models.common import layers
from models.common.capture import capture_qkv
from models.common.decoder import abstract_params, decode_step, forward, init_params, prefill
from models.common.layers import map_rows
from models.common.passes import run_decode_step, run_prefill
from tests.models.tiny import CONFIG, ScaledQueries, random_tokens, tiny_params

DENSE = mj.DenseAttention()


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=0)


def full(tokens, **kwargs):
    return forward(tiny_params(), tokens, config=CONFIG, attention_fn=DENSE, **kwargs)


def read(tokens, **kwargs):
    return prefill(tiny_params(), tokens, config=CONFIG, attention_fn=DENSE, **kwargs)


def test_prefill_and_decode_equal_one_forward_pass():
    tokens = random_tokens(2, 14)
    want = full(tokens)
    logits, cache = read(tokens[:, :9], capacity=14)
    close(logits, want[:, 8])
    for position in range(9, 14):
        logits, cache = decode_step(tiny_params(), tokens[:, position], cache, config=CONFIG)
        close(logits, want[:, position])
    assert cache.lengths.tolist() == [14, 14]


def test_rows_of_different_length_decode_at_their_own_positions():
    tokens = random_tokens(2, 14)
    lengths = jnp.array([9, 4], jnp.int32)
    logits, cache = read(tokens[:, :9], lengths=lengths, capacity=12)
    new = random_tokens(2, 3, seed=5)
    for step in range(3):
        logits, cache = decode_step(tiny_params(), new[:, step], cache, config=CONFIG)
    for row, length in enumerate((9, 4)):
        alone = jnp.concatenate([tokens[row, :length], new[row]])[None, :]
        close(logits[row], full(alone)[0, -1])


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 21, 100])
def test_chunked_prefill_equals_whole(chunk_size):
    tokens, lengths = random_tokens(2, 21), jnp.array([21, 10], jnp.int32)
    want, want_cache = read(tokens, lengths=lengths, capacity=22)
    logits, cache = read(tokens, lengths=lengths, capacity=22, chunk_size=chunk_size)
    close(logits, want)
    assert cache.keys.shape == want_cache.keys.shape
    for row, length in enumerate((21, 10)):
        close(cache.keys[:, row, :length], want_cache.keys[:, row, :length])
        close(cache.values[:, row, :length], want_cache.values[:, row, :length])


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_batch_equals_its_rows_alone(chunk_size):
    tokens, lengths = random_tokens(3, 11), [11, 7, 1]
    logits, _ = read(tokens, lengths=jnp.array(lengths, jnp.int32), chunk_size=chunk_size)
    for row, length in enumerate(lengths):
        close(logits[row], read(tokens[row : row + 1, :length])[0][0])


def test_padding_and_other_rows_change_no_bit():
    tokens, lengths = random_tokens(2, 11), jnp.array([6, 11], jnp.int32)
    logits, _ = read(tokens, lengths=lengths)
    changed = tokens.at[0, 6:].set(3).at[1, :].set(7)
    np.testing.assert_array_equal(read(changed, lengths=lengths)[0][0], logits[0])


def test_map_rows_equals_one_call():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((2, 11, 3)), jnp.float32) for _ in range(2))

    def fn(x, y):
        return x * 2 + y

    for rows in (1, 4, 11, 50):
        close(map_rows(fn, x, y, rows=rows), fn(x, y), atol=0)


def test_mlp_in_chunks_equals_whole(monkeypatch):
    tokens = random_tokens(2, 11)
    want, _ = read(tokens)
    monkeypatch.setattr(layers, "TOKENS_PER_CHUNK", 8)  # 4 rows of each of 2 prompts: 4 + 4 + 3
    run_prefill.clear_cache()
    got, _ = read(tokens)
    run_prefill.clear_cache()
    close(got, want)


def test_dtype_of_parameters_is_that_of_cache_and_logits_are_float32():
    params = tiny_params(dtype=jnp.bfloat16)
    tokens = random_tokens(1, 16)
    logits, cache = prefill(params, tokens, config=CONFIG, attention_fn=DENSE)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    logits, cache = decode_step(params, jnp.array([3], jnp.int32), dataclasses.replace(
        cache, lengths=jnp.array([7], jnp.int32), stored=jnp.full((3, 1), 7, jnp.int32)),
        config=CONFIG)  # fmt: skip
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    want = full(jnp.concatenate([tokens[:, :7], jnp.array([[3]], jnp.int32)], axis=1))[0, -1]
    assert np.corrcoef(logits[0], want)[0, 1] > 0.999


def temporaries(tokens, *, chunk_size=None, **sizes):
    """Bytes that a prefill of this many tokens needs beside its inputs and outputs."""
    config = dataclasses.replace(CONFIG, num_layers=2, max_position=1 << 20, **sizes)
    lowered = jax.jit(
        lambda params, tokens: run_prefill(
            params,
            tokens,
            None,
            jnp.array([8], jnp.int32),
            config=config,
            attention_fn=ScaledQueries(jnp.ones(2)),
            capacity=tokens.shape[1],
            chunk_size=chunk_size,
            observe=None,
        )[:2]
    ).lower(abstract_params(config, jnp.float32), jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_length_times_mlp_width():
    length = 32_768
    base = temporaries(length, hidden_dim=64)
    wide = temporaries(length, hidden_dim=2048)
    # Three [4096, 2048] fp32 intermediates at most, where all rows at once would need 8 times that.
    assert wide - base < 3 * layers.TOKENS_PER_CHUNK * 2048 * 4
    assert wide - base < length * 2048 * 4


def test_memory_does_not_grow_with_the_vocabulary_times_length():
    extra = temporaries(8192, vocab_size=8192) - temporaries(8192, vocab_size=64)
    assert extra < 8192 * 8192 * 4 / 100


def test_attention_is_sliced_layer_by_layer():
    scale = jnp.array([1.0, 2.0, -3.0])
    _, _, seen = read_scaled(scale)
    np.testing.assert_array_equal(seen, scale)


def read_scaled(scale):
    def observe(attention, q, k, v, *, lengths, q_offset):
        return attention(q, k, v, lengths=lengths, q_offset=q_offset), attention.scale

    return prefill(
        tiny_params(),
        random_tokens(1, 4),
        config=CONFIG,
        attention_fn=ScaledQueries(scale),
        observe=observe,
    )


def test_each_layers_attention_changes_the_result():
    def logits(scale):
        return forward(
            tiny_params(), random_tokens(1, 4), config=CONFIG, attention_fn=ScaledQueries(scale)
        )

    base = logits(jnp.ones(3))
    for layer in range(3):
        assert np.abs(logits(jnp.ones(3).at[layer].set(2.0)) - base).max() > 1e-3


def test_new_values_compile_nothing():
    run_prefill.clear_cache()
    run_decode_step.clear_cache()
    for seed in range(3):
        _, cache = prefill(
            tiny_params(),
            random_tokens(1, 9, seed),
            config=CONFIG,
            attention_fn=ScaledQueries(jnp.full(3, float(seed))),
            lengths=jnp.array([9 - seed], jnp.int32),
            capacity=12,
            chunk_size=4,
        )
        decode_step(tiny_params(), jnp.array([seed], jnp.int32), cache, config=CONFIG)
    assert run_prefill._cache_size() == 1
    assert run_decode_step._cache_size() == 1


def test_captured_keys_and_values_are_those_of_the_cache():
    _, cache, qkv = read(random_tokens(2, 9), observe=capture_qkv)
    assert qkv.q.shape == (3, 2, 9, 4, 8)
    np.testing.assert_array_equal(qkv.k, cache.keys)
    np.testing.assert_array_equal(qkv.v, cache.values)
    scores = np.einsum("bqhd,bkhd->bhqk", qkv.q[0], np.repeat(qkv.k[0], 2, axis=2)) / 8**0.5
    scores = np.where(np.tril(np.ones((9, 9), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(qkv.v[0], 2, axis=2))
    close(DENSE(qkv.q[0], qkv.k[0], qkv.v[0]), want)


@pytest.mark.parametrize(("chunk_size", "chunks"), [(4, 3), (9, 1), (50, 1)])
def test_observed_chunks_are_stacked_behind_layers(chunk_size, chunks):
    def offset(attention, q, k, v, *, lengths, q_offset):
        start = jnp.zeros((), jnp.int32) if q_offset is None else q_offset
        return attention(q, k, v, lengths=lengths, q_offset=q_offset), start

    _, _, seen = read(random_tokens(1, 9), chunk_size=chunk_size, observe=offset)
    assert seen.tolist() == [[chunk_size * i for i in range(chunks)]] * 3


def test_abstract_params_are_the_shapes_of_init_params():
    real = init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), real)
    assert described == abstract_params(CONFIG, jnp.bfloat16)


TOKENS = random_tokens(2, 6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"tokens": jnp.zeros((1, 0), jnp.int32)}, "empty", id="empty-prompt"),
        pytest.param({"tokens": TOKENS + 60}, r"0\.\.49.*tokenizer", id="unknown-token"),
        pytest.param({"lengths": jnp.array([6, 0])}, r"1\.\.6.*got 0\.\.6", id="zero-length"),
        pytest.param({"lengths": jnp.array([7, 1])}, r"1\.\.6.*got 1\.\.7", id="too-long-a-row"),
        pytest.param({"capacity": 5}, r"\(5\).*\(6 tokens\)", id="small-capacity"),
        pytest.param({"chunk_size": 0}, "at least 1, got 0", id="chunk-size-0"),
        pytest.param(
            {"tokens": random_tokens(1, 257)}, r"257 tokens.*256.*rope_scaling", id="beyond-context"
        ),
        pytest.param(
            {"attention_fn": ScaledQueries(jnp.ones(5))}, "3 layers", id="wrong-layer-count"
        ),
        pytest.param(
            {"attention_fn": mj.AdaptiveAttention(mj.BlockThreshold(0.1))},
            r"alpha has shape \(\), so this is .* one layer.*`attention\.for_layers\(3\)`",
            id="adaptive-without-layers",
        ),
        pytest.param(
            # As many heads as layers: no shape but the number of axes tells.
            {"attention_fn": mj.AdaptiveAttention(mj.BlockThreshold(np.ones(3)))},
            r"alpha has shape \(3,\), so .*`attention\.for_layers\(3\)`",
            id="adaptive-heads-as-layers",
        ),
        pytest.param(
            {"attention_fn": mj.AdaptiveAttention(mj.BlockThreshold(0.1)).for_layers(2)},
            r"shape \(2, 1\), but the model has 3 layers",
            id="adaptive-other-layers",
        ),
        pytest.param(
            {
                "attention_fn": mj.SparseAttention(
                    mj.HeadPatterns.uniform(mj.Dense(), num_layers=2, num_heads=3)
                ).layer(0)
            },
            "one layer; pass one for all 3 layers of the model$",
            id="layer-of-patterns",
        ),
    ],
)
def test_bad_input_is_explained(kwargs, message):
    arguments = {"tokens": TOKENS, "attention_fn": DENSE, **kwargs}
    with pytest.raises(ValueError, match=message):
        prefill(tiny_params(), config=CONFIG, **arguments)


def test_plain_function_is_refused_as_attention():
    with pytest.raises(TypeError, match=r"tree_util\.Partial"):
        forward(tiny_params(), TOKENS, config=CONFIG, attention_fn=lambda q, k, v, **_: q)


def test_padding_beyond_the_context_is_no_error():
    tokens = random_tokens(1, 260)
    logits, _ = prefill(
        tiny_params(),
        tokens,
        config=CONFIG,
        attention_fn=ScaledQueries(jnp.ones(3)),
        lengths=jnp.array([200], jnp.int32),
    )
    assert np.isfinite(logits).all()


def test_full_cache_is_refused():
    _, cache = read(TOKENS, capacity=7)
    _, cache = decode_step(tiny_params(), TOKENS[:, 0], cache, config=CONFIG)
    with pytest.raises(ValueError, match=r"capacity is 7 .*holds 7"):
        decode_step(tiny_params(), TOKENS[:, 0], cache, config=CONFIG)
    logits, _ = jax.jit(lambda cache: decode_step(
        tiny_params(), TOKENS[:, 0], cache, config=CONFIG))(cache)  # fmt: skip
    assert np.isnan(logits).all()
