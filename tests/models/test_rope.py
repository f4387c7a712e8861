"""Rotary frequencies against transformers', angles against float64, the algebra of rotation."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.common.config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from models.common.rope import apply_rope, attention_factor, frequencies, rotation_tables

HF = np.load(Path(__file__).parents[1] / "golden" / "rope" / "hf_frequencies.npz")
SHORT = tuple(1.0 + 0.01 * i for i in range(48))
LONG = tuple(1.0 + 0.2 * i for i in range(48))
LONGROPE = LongRopeScaling(
    short_factor=SHORT,
    long_factor=LONG,
    original_max_position=4096,
    attention_factor=1.1902380714238083,
)


def rope(scaling=None, *, theta=10000.0, rotary_dim=128, interleaved=False):
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling)


DYNAMIC = rope(DynamicNTKScaling(factor=2.0, original_max_position=4096))
LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)
# 0.1 ln(4) + 1, the default of the YaRN paper (section 3.4).
YARN = YarnScaling(
    factor=4.0,
    original_max_position=32768,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=1.1386294361119891,
    truncate=True,
)
UNTRUNCATED = YarnScaling(
    factor=4.0,
    original_max_position=32,
    beta_fast=20.0,
    beta_slow=2.5,
    attention_factor=1.1386294361119891,
    truncate=False,
)


def radians(config, length):
    """Frequencies of one row of this final length, float64."""
    steps, rest = frequencies(config, jnp.array([length], jnp.int32))
    units = np.asarray(steps, np.float64) + np.asarray(rest, np.float64)
    return units[0] * 2 * np.pi / 2.0**32


@pytest.mark.parametrize(
    ("name", "config", "length"),
    [
        pytest.param("linear", rope(LinearScaling(factor=4.0)), 10, id="linear"),
        pytest.param("dynamic-short", DYNAMIC, 1000, id="dynamic-short"),
        pytest.param("dynamic-long", DYNAMIC, 100_000, id="dynamic-long"),
        pytest.param("llama3", rope(LLAMA3, theta=500000.0), 10, id="llama3"),
        pytest.param("yarn", rope(YARN, theta=1000000.0), 10, id="yarn"),
        pytest.param("yarn-untruncated", rope(UNTRUNCATED, rotary_dim=64), 10, id="untruncated"),
        pytest.param("longrope-short", rope(LONGROPE, rotary_dim=96), 4096, id="longrope-short"),
        pytest.param("longrope-long", rope(LONGROPE, rotary_dim=96), 4097, id="longrope-long"),
    ],
)
def test_frequencies_equal_transformers(name, config, length):
    np.testing.assert_allclose(radians(config, length), HF[name], rtol=2e-6)
    assert attention_factor(config.scaling) == pytest.approx(float(HF[f"{name}:factor"]))


def test_frequencies_follow_each_rows_length():
    config = rope(LONGROPE, rotary_dim=96)
    steps, _ = frequencies(config, jnp.array([4096, 4097, 12], jnp.int32))
    assert np.array_equal(steps[0], steps[2])
    assert not np.array_equal(steps[0], steps[1])


@pytest.mark.parametrize("position", [0, 1, 1000, 131_071, 1_048_575, 4_194_303, 2_000_000_000])
def test_angles_are_exact_at_any_position(position):
    config = rope(theta=1e8, rotary_dim=64)
    cos, sin = rotation_tables(
        config, jnp.array([[position]], jnp.int32), jnp.array([1], jnp.int32)
    )
    angles = position * 1e8 ** -(np.arange(0, 64, 2) / 64)  # float64
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved):
    config = rope(theta=5e5, rotary_dim=64, interleaved=interleaved)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 64)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        turned = []
        for x, position in ((q, q_position), (k, k_position)):
            tables = rotation_tables(
                config, jnp.array([[position]], jnp.int32), jnp.array([1], jnp.int32)
            )
            turned.append(apply_rope(x, *tables, interleaved=interleaved))
        return float(jnp.sum(turned[0] * turned[1]))

    near = score(1234, 0)
    assert score(1_048_000, 1_048_000 - 1234) == pytest.approx(near, abs=5e-5)
    assert score(4_194_000, 4_194_000 - 1234) == pytest.approx(near, abs=5e-5)
    assert score(1235, 0) != pytest.approx(near, abs=1e-2)


def test_partial_rotation_keeps_the_rest():
    config = rope(rotary_dim=8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 20)), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(5, 8)[None, :], (2, 3))
    cos, sin = rotation_tables(config, positions, jnp.array([8, 8], jnp.int32))
    turned = apply_rope(x, cos, sin, interleaved=False)
    assert turned.dtype == x.dtype
    assert np.array_equal(turned[..., 8:], x[..., 8:])
    assert not np.array_equal(turned[..., :8], x[..., :8])


def test_interleaved_is_half_split_with_reordered_coordinates():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 6, 2, 16)), jnp.float32)
    positions = jnp.arange(6)[None, :]
    cos, sin = rotation_tables(rope(rotary_dim=16), positions, jnp.array([6], jnp.int32))
    order = np.arange(16).reshape(2, 8).T.ravel()  # (i, i + 8) becomes (2i, 2i + 1)
    split = apply_rope(x, cos, sin, interleaved=False)
    together = apply_rope(x[..., order], cos, sin, interleaved=True)
    np.testing.assert_allclose(together, split[..., order], atol=1e-6)


def test_rotation_is_that_of_complex_numbers():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, 4, 1, 6)).astype(np.float32)
    positions = np.array([[0, 3, 50, 7]])
    cos, sin = rotation_tables(
        rope(rotary_dim=6), jnp.asarray(positions), jnp.array([51], jnp.int32)
    )
    turned = np.asarray(apply_rope(jnp.asarray(x), cos, sin, interleaved=True))
    complex_x = x[..., 0::2] + 1j * x[..., 1::2]
    angles = positions[0][:, None] * 10000.0 ** -(np.arange(3) / 3)
    expected = complex_x * np.exp(1j * angles)[None, :, None, :]
    np.testing.assert_allclose(turned[..., 0::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-5)
