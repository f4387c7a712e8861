"""Generation: greedy against full forward passes, stopping, batches, statistics of sampling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import DenseAttention
from models.common.config import LongRopeScaling
from models.common.decoder import forward, prefill
from models.common.generate import _generate, decode_greedily, generate
from models.common.sampling import Sampling, choice_of, choose_tokens
from tests.models.tiny import CONFIG, ScaledQueries, random_tokens, tiny_params

DENSE = DenseAttention()
GREEDY = Sampling()
NEW = 6


def run(tokens, **kwargs):
    arguments = {
        "config": CONFIG,
        "attention_fn": DENSE,
        "max_new_tokens": NEW,
        "sampling": GREEDY,
        **kwargs,
    }
    return generate(tiny_params(), tokens, **arguments)


def greedy_by_forward(prompt):
    """The greedy continuation of one prompt by full passes over a padded buffer."""
    tokens = np.zeros((1, len(prompt) + NEW), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), tokens.shape[1]):
        lengths = jnp.array([end], jnp.int32)
        logits = forward(
            tiny_params(),
            jnp.asarray(tokens),
            config=CONFIG,
            attention_fn=DENSE,
            lengths=lengths,
        )
        tokens[0, end] = int(np.argmax(logits[0, end - 1]))
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_greedy_batch_equals_forward_passes_row_by_row(chunk_size):
    tokens, lengths = random_tokens(3, 9), [9, 5, 2]
    result = run(tokens, lengths=jnp.array(lengths, jnp.int32), chunk_size=chunk_size)
    for row, length in enumerate(lengths):
        assert result.tokens[row].tolist() == greedy_by_forward(np.asarray(tokens[row, :length]))
    assert result.lengths.tolist() == [NEW] * 3


def test_decoding_ends_with_the_last_row_and_at_any_limit():
    tokens = random_tokens(2, 9)
    free = np.asarray(run(tokens).tokens)
    stops = int(free[0, 1]), int(free[1, 3])
    ends = [min(row.index(stop) for stop in stops if stop in row) for row in free.tolist()]
    assert 0 < max(ends) < NEW
    logits, cache = prefill(
        tiny_params(), tokens, config=CONFIG, attention_fn=DENSE, capacity=9 + NEW,
        rope_length=jnp.full(2, 9 + NEW),
    )  # fmt: skip
    sizes = {"config": CONFIG, "max_new_tokens": NEW, "stop_tokens": stops}
    decode = jax.jit(functools.partial(decode_greedily, **sizes))
    for limit in (NEW, 1):
        found, after = decode(tiny_params(), logits, cache, limit)
        lengths = [min(end, limit) for end in ends]
        assert found.lengths.tolist() == lengths
        for row, length in enumerate(lengths):
            assert found.tokens[row].tolist() == [*free[row, :length], *[0] * (NEW - length)]
        # A step for each token but the first one; none after the last row has stopped.
        steps = min(max(ends), limit - 1)
        assert after.lengths.tolist() == [9 + steps] * 2


def test_each_row_ends_before_its_own_stop_token():
    tokens = random_tokens(2, 9)
    free = np.asarray(run(tokens).tokens)
    stop = int(free[0, 2])
    first = [row.tolist().index(stop) if stop in row else NEW for row in free]
    assert first[0] <= 2
    result = run(tokens, stop_tokens=(stop, 49))
    for row, end in enumerate(first):
        end = min(end, *(i for i, token in enumerate([*free[row], 49]) if token == 49))
        assert result.lengths[row] == end
        assert result.tokens[row].tolist() == [*free[row, :end], *[0] * (NEW - end)]


def test_prefill_uses_the_attention_it_is_given():
    tokens = random_tokens(1, 9)
    attention = ScaledQueries(jnp.array([1.0, -2.0, 0.5]))
    logits, _ = prefill(tiny_params(), tokens, config=CONFIG, attention_fn=attention)
    result = run(tokens, attention_fn=attention, max_new_tokens=1)
    assert result.tokens[0, 0] == np.argmax(logits[0])


def test_rotary_frequencies_are_those_of_the_finished_row():
    divisors = tuple(1.0 + i for i in range(4))
    scaling = LongRopeScaling(
        short_factor=(1.0,) * 4,
        long_factor=divisors,
        original_max_position=10,
        attention_factor=1.0,
    )
    config = dataclasses.replace(CONFIG, rope=dataclasses.replace(CONFIG.rope, scaling=scaling))
    tokens = random_tokens(1, 9)  # 9 + 6 tokens are long, 9 alone are not
    result = generate(
        tiny_params(),
        tokens,
        config=config,
        attention_fn=DENSE,
        max_new_tokens=NEW,
        sampling=GREEDY,
    )
    sequence = jnp.concatenate([tokens, result.tokens], axis=1)
    logits = forward(
        tiny_params(),
        sequence,
        config=config,
        attention_fn=DENSE,
        rope_length=jnp.array([15], jnp.int32),
    )
    assert np.argmax(logits[0, 8:-1], axis=-1).tolist() == result.tokens[0].tolist()


LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.2, 0.05, 0.3]], jnp.float32))


def draws(sampling, logits=LOGITS, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    choice = choice_of(sampling, logits.shape[-1])
    tokens = jax.vmap(lambda key: choose_tokens(logits, choice, key))(keys)
    return np.bincount(np.asarray(tokens)[:, 0], minlength=5) / count


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        pytest.param(Sampling(temperature=1.0), [0.05, 0.4, 0.2, 0.05, 0.3], id="plain"),
        pytest.param(
            # Probabilities to the power of 1/2, normalised.
            Sampling(temperature=2.0),
            np.sqrt([0.05, 0.4, 0.2, 0.05, 0.3]) / np.sqrt([0.05, 0.4, 0.2, 0.05, 0.3]).sum(),
            id="temperature",
        ),
        pytest.param(Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 0, 0, 3 / 7], id="top-k"),
        # 0.4 + 0.3 do not reach 0.75, so 0.2 is in: the smallest set that does.
        pytest.param(
            Sampling(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 0, 3 / 9], id="top-p"
        ),
        pytest.param(
            Sampling(temperature=1.0, top_p=0.65), [0, 4 / 7, 0, 0, 3 / 7], id="top-p-reached"
        ),
        pytest.param(Sampling(temperature=1.0, top_p=0.01), [0, 1, 0, 0, 0], id="top-p-tiny"),
        # Top-p is of what top-k leaves: 4/9 + 3/9 reach 0.75 there.
        pytest.param(
            Sampling(temperature=1.0, top_k=3, top_p=0.75), [0, 4 / 7, 0, 0, 3 / 7], id="both"
        ),
        pytest.param(
            Sampling(temperature=1.0, top_k=99, top_p=1.0), [0.05, 0.4, 0.2, 0.05, 0.3], id="all"
        ),
    ],
)
def test_sampled_frequencies_are_the_filtered_probabilities(sampling, want):
    got = draws(sampling)
    np.testing.assert_allclose(got, want, atol=0.03)
    assert not got[np.asarray(want) == 0].any()


def test_top_k_of_one_is_greedy():
    tokens = random_tokens(2, 9)
    sampled = run(tokens, sampling=Sampling(temperature=1.5, top_k=1), key=jax.random.key(3))
    np.testing.assert_array_equal(sampled.tokens, run(tokens).tokens)


def test_same_key_same_tokens_and_other_key_other_tokens():
    tokens = random_tokens(2, 9)
    sampling = Sampling(temperature=2.0)
    first, again, other = (
        run(tokens, sampling=sampling, key=jax.random.key(seed)).tokens for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_new_sampling_values_compile_nothing():
    _generate.clear_cache()
    for seed, sampling in enumerate(
        [
            Sampling(temperature=1.0, top_k=5),
            Sampling(temperature=0.3, top_p=0.5),
            Sampling(temperature=2.0, top_k=1, top_p=0.9),
        ]
    ):
        run(random_tokens(1, 4, seed), sampling=sampling, key=jax.random.key(seed))
    assert _generate._cache_size() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"max_new_tokens": 0}, "at least 1, got 0", id="no-new-tokens"),
        pytest.param({"sampling": Sampling(temperature=1.0)}, "needs `key`", id="no-key"),
        pytest.param({"max_new_tokens": 250}, "259 tokens do not fit", id="beyond-context"),
        pytest.param({"lengths": jnp.array([0])}, r"1\.\.9", id="empty-row"),
        pytest.param({"chunk_size": 0}, "at least 1, got 0", id="chunk-size-0"),
    ],
)
def test_bad_input_is_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(random_tokens(1, 9), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"temperature": -0.1}, "-0.1", id="negative-temperature"),
        pytest.param({"temperature": float("nan")}, "nan", id="nan-temperature"),
        pytest.param({"top_k": 0}, "at least 1, got 0", id="top-k-0"),
        pytest.param({"top_p": 0.0}, "above 0", id="top-p-0"),
        pytest.param({"top_p": 1.1}, "at most 1, got 1.1", id="top-p-above-1"),
    ],
)
def test_bad_sampling_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**kwargs)
