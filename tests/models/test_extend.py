"""More tokens read onto a cache, and generation from it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.kv_cache import EightBitKV, SnapKV
from models.common.decoder import decode_step, extend, prefill
from models.common.passes import run_extend
from tests.models.tiny import CONFIG, ScaledQueries, random_tokens, tiny_params

DENSE = mj.DenseAttention()
PARAMS = tiny_params()
FIRST, SECOND, THIRD = 13, 5, 3
TOKENS = random_tokens(1, FIRST + SECOND + THIRD)
SNAP = SnapKV(budget=9, window=3, kernel_size=3)


def read(tokens, **kwargs):
    end = jnp.full((1,), TOKENS.shape[1], jnp.int32)
    kwargs = {"attention_fn": DENSE, "capacity": 40, "rope_length": end} | kwargs
    return prefill(PARAMS, tokens, config=CONFIG, **kwargs)


def go_on(tokens, cache, *, width=None, **kwargs):
    real = tokens.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (0, (width or real) - real)), constant_values=7)
    lengths = None if width is None else jnp.array([real], jnp.int32)
    return extend(
        PARAMS, padded, cache, config=CONFIG, lengths=lengths, **{"attention_fn": DENSE} | kwargs
    )


def test_pieces_read_one_after_the_other_equal_the_whole():
    want, whole = read(TOKENS)
    _, cache = read(TOKENS[:, :FIRST])
    _, cache = go_on(TOKENS[:, FIRST : FIRST + SECOND], cache, width=8)
    logits, cache = go_on(TOKENS[:, FIRST + SECOND :], cache, width=8)
    np.testing.assert_allclose(logits, want, atol=2e-5, rtol=0)
    total = TOKENS.shape[1]
    np.testing.assert_allclose(
        cache.keys[:, :, :total], whole.keys[:, :, :total], atol=2e-5, rtol=0
    )
    assert cache.stored.tolist() == whole.stored.tolist()
    assert cache.lengths.tolist() == [total]


@pytest.mark.parametrize(
    ("compression", "kept"),
    [
        pytest.param(SNAP, 9, id="snapkv"),
        pytest.param(EightBitKV(), FIRST, id="int8"),
    ],
)
def test_a_compressed_cache_is_continued_as_by_single_steps(compression, kept):
    _, start = read(TOKENS[:, :FIRST], compression=compression)
    cache = start
    for token in TOKENS[0, FIRST:]:
        want, cache = decode_step(PARAMS, token[None], cache, config=CONFIG)
    logits, more = go_on(TOKENS[:, FIRST:], start)
    np.testing.assert_allclose(logits, want, atol=2e-5, rtol=0)
    assert more.stored.tolist() == cache.stored.tolist() == [[kept + SECOND + THIRD]] * 3
    assert more.lengths.tolist() == cache.lengths.tolist()
    # The one that was continued is as before: another continuation does not see the first.
    again, _ = go_on(TOKENS[:, FIRST:], start)
    np.testing.assert_array_equal(again, logits)


def test_the_attention_is_given_its_layer_and_where_the_tokens_stand():
    _, start = read(TOKENS[:, :FIRST])
    scaled = ScaledQueries(jnp.arange(1.0, 4.0))

    def attend(attention, q, k, v, *, lengths, q_offset):
        return q, (attention.scale, lengths, q_offset, jnp.asarray(k.shape[1]))

    _, _, seen = go_on(TOKENS[:, :SECOND], start, width=8, attention_fn=scaled, observe=attend)
    assert [np.asarray(x).ravel().tolist() for x in seen] == [
        [1, 2, 3], [FIRST + SECOND] * 3, [FIRST] * 3, [40] * 3,
    ]  # fmt: skip


def test_other_tokens_and_lengths_compile_nothing():
    _, cache = read(TOKENS[:, :FIRST])
    go_on(TOKENS[:, :3], cache, width=8)
    compiled = run_extend._cache_size()
    _, cache = go_on(TOKENS[:, 3:7], cache, width=8)
    go_on(TOKENS[:, 7:8], cache, width=8)
    assert run_extend._cache_size() == compiled


def test_what_does_not_fit_is_told():
    _, cache = read(TOKENS[:, :FIRST])
    with pytest.raises(ValueError, match="capacity is 40 tokens, a row holds 13, and 28 more"):
        go_on(TOKENS[:, :3], cache, width=28)
    with pytest.raises(ValueError, match=r"one row at a time.*2 rows of tokens and 1"):
        go_on(random_tokens(2, 3), cache)
    full = dataclasses.replace(cache, lengths=cache.lengths + 240)
    with pytest.raises(ValueError, match="258 tokens do not fit the model's context of 256"):
        go_on(TOKENS[:, :5], full)
