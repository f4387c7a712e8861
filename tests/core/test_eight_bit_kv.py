"""Keys and values in 8 bits, against numpy's own rounding, and nothing kept at all."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minference_jax.kv_cache import DropKV, EightBitKV, StreamingKV
from minference_jax.kv_cache.eight_bits import from_8_bits, headroom, to_8_bits
from tests.helpers import random_qkv

LENGTHS = np.array([40, 17], np.int32)
BOTH = [pytest.param(jnp.int8, id="int8"), pytest.param(jnp.float8_e4m3fn, id="fp8")]


def keys_with_outliers():
    """Channels and heads of very different sizes, as keys of real models have; padding is huge."""
    q, k, v = random_qkv(3, batch=2, q_len=40)
    k *= np.geomspace(0.02, 30, 16, dtype=np.float32) * np.array([[1.0], [50.0]], np.float32)
    v *= 1e-3
    k[1, 17:], v[1, 17:] = 1e6, 1e6
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


@pytest.mark.parametrize("dtype", BOTH)
def test_every_number_is_rounded_to_the_nearest_of_its_channel(dtype):
    q, k, v = keys_with_outliers()
    kept = EightBitKV(dtype=dtype)(q, k, v, lengths=jnp.asarray(LENGTHS))
    assert kept.keys.dtype == kept.values.dtype == dtype
    assert kept.stored.tolist() == LENGTHS.tolist()
    for stored, scale, of in zip((kept.keys, kept.values), kept.scales, (k, v), strict=True):
        for row, n in enumerate(LENGTHS):
            x = np.asarray(of[row, :n], np.float32)
            most = 1.5 * (1 + 32 / n) * np.abs(x).max(axis=0)
            want = most / (127 if dtype == jnp.int8 else 448)
            np.testing.assert_allclose(scale[row], want, rtol=1e-6)
            scaled = x / np.asarray(scale[row])
            if dtype == jnp.int8:
                rounded, bound = np.rint(scaled), most / 253
            else:
                rounded = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
                bound = np.maximum(np.abs(x), most / 448 / 64) / 16
            np.testing.assert_array_equal(np.asarray(stored[row, :n], np.float32), rounded)
            back = np.asarray(from_8_bits(stored, scale, jnp.float32)[row, :n])
            assert np.all(np.abs(back - x) <= bound)


@pytest.mark.parametrize("dtype", BOTH)
def test_later_numbers_beyond_the_headroom_become_the_largest(dtype):
    q, k, v = random_qkv(0, q_len=5)
    kept = EightBitKV(dtype=dtype)(*map(jnp.asarray, (q, k, v)))
    largest = np.abs(k).max(axis=(0, 1))
    most = float(headroom(jnp.array(5)))
    new = jnp.asarray(np.stack([0.9 * most * largest, -2 * most * largest])[None], jnp.float32)
    stored = to_8_bits(new, kept.scales.keys, dtype)
    back = from_8_bits(stored, kept.scales.keys, jnp.float32)
    np.testing.assert_allclose(back[0, 0], 0.9 * most * largest, rtol=1 / 16)
    np.testing.assert_allclose(back[0, 1], -most * largest, rtol=1e-6)


def test_zeros_stay_zeros():
    zero = jnp.zeros((1, 4, 2, 8))
    kept = EightBitKV()(jnp.zeros((1, 4, 4, 8)), zero, zero)
    back = from_8_bits(kept.keys, kept.scales.keys, jnp.float32)
    np.testing.assert_array_equal(back, zero)


def test_what_another_method_keeps_is_kept_in_8_bits():
    q, k, v = keys_with_outliers()
    ends = StreamingKV(3, 6)
    whole = ends(q, k, v, lengths=jnp.asarray(LENGTHS))
    kept = EightBitKV(ends)(q, k, v, lengths=jnp.asarray(LENGTHS))
    assert EightBitKV(ends).capacity == 9
    assert kept.keys.shape == whole.keys.shape
    for stored, scale, want in zip((kept.keys, kept.values), kept.scales, whole[:2], strict=True):
        back = from_8_bits(stored, scale, jnp.float32)
        assert np.all(np.abs(back - want) <= np.asarray(scale)[:, None] * 0.5001)


def test_nothing_is_kept():
    q, k, v = keys_with_outliers()
    kept = DropKV()(q, k, v)
    assert kept.keys.shape == kept.values.shape == (2, 0, 2, 16)
    assert kept.stored.tolist() == [0, 0]


def test_other_types_of_numbers_are_refused():
    with pytest.raises(ValueError, match=r"jnp\.int8 or jnp\.float8_e4m3fn, got int4"):
        EightBitKV(dtype=jnp.int4)


@pytest.mark.parametrize("compression", [EightBitKV(), EightBitKV(StreamingKV()), DropKV()])
def test_queries_of_another_length_are_refused(compression, as_users_see_it):
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=4, kv_len=8))
    with pytest.raises(ValueError, match="`q` has 4 rows and `k` 8"):
        compression(q, k, v)
