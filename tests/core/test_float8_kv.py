"""Keys and values in 8 bits, against numpy's own rounding, and nothing kept at all."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minference_jax.kv_cache import DropKV, Float8KV, StreamingKV
from minference_jax.kv_cache.float8 import HEADROOM, from_float8, to_float8
from tests.helpers import random_qkv

LENGTHS = np.array([40, 17], np.int32)


def keys_with_outliers():
    """Channels and heads of very different sizes, as keys of real models have; padding is huge."""
    q, k, v = random_qkv(3, batch=2, q_len=40)
    k *= np.geomspace(0.02, 30, 16, dtype=np.float32) * np.array([[1.0], [50.0]], np.float32)
    v *= 1e-3
    k[1, 17:], v[1, 17:] = 1e6, 1e6
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def test_every_number_is_rounded_to_the_nearest_float8_of_its_head():
    q, k, v = keys_with_outliers()
    kept = Float8KV()(q, k, v, lengths=jnp.asarray(LENGTHS))
    assert kept.keys.dtype == kept.values.dtype == jnp.float8_e4m3fn
    assert kept.stored.tolist() == LENGTHS.tolist()
    for stored, scale, of in zip((kept.keys, kept.values), kept.scales, (k, v), strict=True):
        for row, n in enumerate(LENGTHS):
            x = np.asarray(of[row, :n], np.float32)
            want = HEADROOM * np.abs(x).max(axis=(0, 2)) / 448
            np.testing.assert_allclose(scale[row], want, rtol=1e-6)
            rounded = (x / np.asarray(scale[row])[:, None]).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(np.asarray(stored[row, :n]), rounded)
            back = np.asarray(from_float8(stored, scale, jnp.float32)[row, :n])
            least = np.asarray(scale[row])[:, None] * 2.0**-6  # below it steps are equal
            assert np.all(np.abs(back - x) <= np.maximum(np.abs(x), least) / 16)


def test_later_numbers_beyond_the_headroom_become_the_largest():
    q, k, v = random_qkv(0, q_len=5)
    kept = Float8KV()(*map(jnp.asarray, (q, k, v)))
    largest = np.abs(k).max(axis=(0, 1, 3))
    new = jnp.asarray(np.stack([1.9 * largest, -5 * largest])[None, :, :, None], jnp.float32)
    back = from_float8(to_float8(new, kept.scales.keys), kept.scales.keys, jnp.float32)
    np.testing.assert_allclose(back[0, 0, :, 0], 1.9 * largest, rtol=1 / 16)
    np.testing.assert_allclose(back[0, 1, :, 0], -HEADROOM * largest, rtol=1e-6)


def test_zeros_stay_zeros():
    zero = jnp.zeros((1, 4, 2, 8))
    kept = Float8KV()(jnp.zeros((1, 4, 4, 8)), zero, zero)
    back = from_float8(kept.keys, kept.scales.keys, jnp.float32)
    np.testing.assert_array_equal(back, zero)


def test_what_another_method_keeps_is_kept_in_8_bits():
    q, k, v = keys_with_outliers()
    ends = StreamingKV(3, 6)
    whole = ends(q, k, v, lengths=jnp.asarray(LENGTHS))
    kept = Float8KV(ends)(q, k, v, lengths=jnp.asarray(LENGTHS))
    assert Float8KV(ends).capacity == 9
    assert kept.keys.shape == whole.keys.shape
    for stored, scale, want in zip((kept.keys, kept.values), kept.scales, whole[:2], strict=True):
        back = from_float8(stored, scale, jnp.float32)
        np.testing.assert_allclose(back, want, rtol=1 / 16, atol=float(scale.max()) * 2.0**-10)


def test_nothing_is_kept():
    q, k, v = keys_with_outliers()
    kept = DropKV()(q, k, v)
    assert kept.keys.shape == kept.values.shape == (2, 0, 2, 16)
    assert kept.stored.tolist() == [0, 0]


@pytest.mark.parametrize("compression", [Float8KV(), Float8KV(StreamingKV()), DropKV()])
def test_queries_of_another_length_are_refused(compression, as_users_see_it):
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=4, kv_len=8))
    with pytest.raises(ValueError, match="`q` has 4 rows and `k` 8"):
        compression(q, k, v)
