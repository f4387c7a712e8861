"""No configuration field is ignored: each one, changed, changes the model; nonsense is refused."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import DenseAttention
from models.common.config import (
    DecoderConfig,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from models.common.decoder import abstract_params, forward, prefill
from models.common.rope import rotation_tables
from tests.models.tiny import CONFIG, random_tokens, tiny_params

# Fields that decide shapes; the tree of parameters must change.
SHAPE_FIELDS = {
    "vocab_size": 60,
    "embed_dim": 24,
    "hidden_dim": 40,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 4,
    "head_dim": 16,
    "qkv_bias": False,
    "o_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
# Fields that only decide numbers; with the same parameters the logits must change.
NUMBER_FIELDS = {"norm_eps": 1e-2}
ROPE_FIELDS = {
    "theta": 500.0,
    "rotary_dim": 4,
    "interleaved": True,
    "scaling": LinearScaling(factor=2.0),
}
# `max_position` has its own test.
OTHER_FIELDS = {"max_position", "rope"}

SCALINGS = {
    LinearScaling(factor=2.0): {"factor": 3.0},
    DynamicNTKScaling(factor=2.0, original_max_position=16): {
        "factor": 3.0,
        "original_max_position": 20,
    },
    Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    ): {
        "factor": 4.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 8.0,
        "original_max_position": 128,
    },
    YarnScaling(
        factor=4.0,
        original_max_position=64,
        beta_fast=4.0,
        beta_slow=0.7,
        attention_factor=1.1,
        truncate=True,
    ): {
        "factor": 2.0,
        "original_max_position": 256,
        "beta_fast": 9.0,
        "beta_slow": 0.01,
        "attention_factor": 1.2,
        "truncate": False,
    },
}


def longrope(**changes):
    fields = {
        "short_factor": (1.0,) * 16,
        "long_factor": tuple(1.0 + i for i in range(16)),
        "original_max_position": 30,
        "attention_factor": 1.1,
    }
    return LongRopeScaling(**{**fields, **changes})


def logits(config):
    return forward(tiny_params(), random_tokens(1, 8), config=config, attention_fn=DenseAttention())


def test_every_field_is_covered():
    covered = SHAPE_FIELDS.keys() | NUMBER_FIELDS.keys() | OTHER_FIELDS
    assert covered == {field.name for field in dataclasses.fields(DecoderConfig)}
    assert ROPE_FIELDS.keys() == {field.name for field in dataclasses.fields(RopeConfig)}
    kinds = {type(scaling): changes for scaling, changes in SCALINGS.items()}
    for kind in typing.get_args(RopeScaling):
        if kind is not LongRopeScaling:
            assert kinds[kind].keys() == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", SHAPE_FIELDS)
def test_field_changes_the_parameter_tree(name):
    changed = dataclasses.replace(CONFIG, **{name: SHAPE_FIELDS[name]})
    before, after = (abstract_params(config, jnp.float32) for config in (CONFIG, changed))
    assert before != after
    # and the forward pass reads that tree
    params = tiny_params(changed)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, after
    )
    out = jax.eval_shape(
        lambda params: forward(
            params, random_tokens(1, 8), config=changed, attention_fn=DenseAttention()
        ),
        after,
    )
    assert out.shape == (1, 8, changed.vocab_size)


@pytest.mark.parametrize("name", ["qkv_bias", "o_bias", "mlp_bias"])
def test_every_bias_is_added(name):
    config = dataclasses.replace(CONFIG, **{"qkv_bias": False, name: True})
    flat, tree = jax.tree_util.tree_flatten_with_path(tiny_params(config))

    def run(leaves):
        return forward(
            jax.tree.unflatten(tree, leaves),
            random_tokens(1, 8),
            config=config,
            attention_fn=DenseAttention(),
        )

    leaves = [leaf for _, leaf in flat]
    base = run(leaves)
    biases = [i for i, (path, _) in enumerate(flat) if path[-1].key == "bias"]
    assert len(biases) == {"qkv_bias": 3, "o_bias": 1, "mlp_bias": 3}[name]
    for i in biases:
        # A constant added to all keys of a head cancels in the softmax; a scaled bias does not.
        changed = run([leaf * 2 if j == i else leaf for j, leaf in enumerate(leaves)])
        assert np.abs(changed - base).max() > 1e-3, jax.tree_util.keystr(flat[i][0])


@pytest.mark.parametrize("name", NUMBER_FIELDS)
def test_field_changes_the_logits(name):
    changed = dataclasses.replace(CONFIG, **{name: NUMBER_FIELDS[name]})
    assert np.abs(logits(changed) - logits(CONFIG)).max() > 1e-3


@pytest.mark.parametrize("name", ROPE_FIELDS)
def test_rope_field_changes_the_logits(name):
    rope = dataclasses.replace(CONFIG.rope, **{name: ROPE_FIELDS[name]})
    changed = dataclasses.replace(CONFIG, rope=rope)
    assert np.abs(logits(changed) - logits(CONFIG)).max() > 1e-3


def tables(scaling, length):
    rope = RopeConfig(theta=10000.0, rotary_dim=32, interleaved=False, scaling=scaling)
    positions = jnp.arange(length)[None, :]
    return np.stack(rotation_tables(rope, positions, jnp.array([length], jnp.int32)))


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        pytest.param(scaling, name, id=f"{type(scaling).__name__}-{name}")
        for scaling, changes in SCALINGS.items()
        for name in changes
    ],
)
def test_scaling_field_changes_the_rotation(scaling, name):
    changed = dataclasses.replace(scaling, **{name: SCALINGS[scaling][name]})
    assert np.abs(tables(changed, 40) - tables(scaling, 40)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        pytest.param({"short_factor": (2.0,) * 16}, 30, id="short_factor"),
        pytest.param({"long_factor": (2.0,) * 16}, 31, id="long_factor"),
        pytest.param({"original_max_position": 31}, 31, id="original_max_position"),
        pytest.param({"attention_factor": 1.3}, 30, id="attention_factor"),
    ],
)
def test_longrope_field_changes_the_rotation(changes, length):
    assert np.abs(tables(longrope(**changes), length) - tables(longrope(), length)).max() > 1e-3


def test_longrope_reads_only_the_divisors_of_its_length():
    np.testing.assert_array_equal(
        tables(longrope(long_factor=(9.0,) * 16), 30), tables(longrope(), 30)
    )
    np.testing.assert_array_equal(
        tables(longrope(short_factor=(9.0,) * 16), 31), tables(longrope(), 31)
    )


def test_max_position_bounds_the_prompt():
    config = dataclasses.replace(CONFIG, max_position=7)
    with pytest.raises(ValueError, match="8 tokens do not fit the model's context of 7"):
        logits(config)


def test_dynamic_scaling_reads_beyond_max_position():
    scaling = DynamicNTKScaling(factor=2.0, original_max_position=7)
    rope = dataclasses.replace(CONFIG.rope, scaling=scaling)
    config = dataclasses.replace(CONFIG, max_position=7, rope=rope)
    out, _ = prefill(
        tiny_params(), random_tokens(1, 8), config=config, attention_fn=DenseAttention()
    )
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_kv_heads": 3}, r"\(4\).*\(3\)", id="heads-not-a-multiple"),
        pytest.param({"num_kv_heads": 0}, "`num_kv_heads` must be at least 1", id="no-kv-heads"),
        pytest.param({"num_layers": 0}, "`num_layers` must be at least 1", id="no-layers"),
        pytest.param({"head_dim": 4}, r"\(8\) must not exceed `head_dim` \(4\)", id="rotary-dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"rotary_dim": 7}, "even and positive, got 7", id="odd-rotary-dim"),
        pytest.param({"theta": 1.0}, "above 1, got 1.0", id="theta"),
        pytest.param(
            {"scaling": longrope()}, "short_factor.*4 rotated pairs, got 16", id="longrope-factors"
        ),
        pytest.param(
            {
                "rotary_dim": 2,
                "scaling": DynamicNTKScaling(factor=2.0, original_max_position=7),
            },
            ">= 4, got 2",
            id="dynamic-rotary-dim",
        ),
    ],
)
def test_rope_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG.rope, **changes)
