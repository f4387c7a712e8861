"""Every implementation of the op against a numpy brute force that shares no code with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockSparseIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention import index as index_module
from pallas_kernels.block_sparse_attention.index import NO_TILE, validate
from pallas_kernels.block_sparse_attention.unstagger import unstagger
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv
from tests.kernels.attention_cases import mixed_index

IMPLEMENTATIONS = ("reference", "xla")


def make_index(lists, columns, *, block_q, block_kv):
    """`lists[b][h][i]` = starts of query tile i; `columns[b][h]` = keys. Absolute starts."""
    batch, heads, rows = len(lists), len(lists[0]), len(lists[0][0])
    width = max(1, max(len(t) for b in lists for h in b for t in h))
    capacity = max(1, max(len(c) for b in columns for c in b))
    entries = np.full((batch, heads, rows * width), NO_TILE, np.int32)
    count = np.zeros((batch, heads, rows), np.int32)
    keys = np.full((batch, heads, capacity), 2**30, np.int32)
    column_count = np.zeros((batch, heads), np.int32)
    for b, h in np.ndindex(batch, heads):
        for i, starts in enumerate(lists[b][h]):
            entries[b, h, i * width : i * width + len(starts)] = sorted(starts, reverse=True)
            count[b, h, i] = len(starts)
        keys[b, h, : len(columns[b][h])] = sorted(columns[b][h])
        column_count[b, h] = len(columns[b][h])
    begin = np.broadcast_to(np.arange(rows, dtype=np.int32) * width, count.shape)
    arrays = (entries, begin, count, np.zeros_like(count), keys, column_count)
    return BlockSparseIndex(*map(jnp.asarray, arrays), block_q=block_q, block_kv=block_kv)


def brute_force_mask(lists, columns, q_len, kv_len, *, block_q, block_kv, offset, lengths):
    mask = np.zeros((len(lists), len(lists[0]), q_len, kv_len), bool)
    for b, h, row in np.ndindex(*mask.shape[:3]):
        for start in lists[b][h][row // block_q]:
            for key in range(start, start + block_kv):
                if 0 <= key < min(lengths[b], offset + row + 1):
                    mask[b, h, row, key] = True
        for key in columns[b][h]:
            if key < min(lengths[b], offset + row + 1):
                mask[b, h, row, key] = True
    return mask


def random_lists(rng, batch, heads, q_len, kv_len, *, block_q, block_kv, offset):
    """Disjoint tiles at multiples of 8, some before key 0 and some past the end."""

    def one_tile(last_row):
        position, starts = 8 * int(rng.integers(-block_kv // 8 + 1, 3)), []
        while position <= last_row:
            starts.append(position)
            position += block_kv + 8 * int(rng.integers(0, 6))
        keep = rng.random(len(starts)) < rng.choice([0.0, 0.5, 1.0])
        return [start for start, kept in zip(starts, keep, strict=True) if kept]

    rows = -(-q_len // block_q)
    lists = [
        [[one_tile(offset + (i + 1) * block_q - 1) for i in range(rows)] for _ in range(heads)]
        for _ in range(batch)
    ]
    columns = [
        [
            sorted(rng.choice(kv_len, size=int(rng.integers(0, min(kv_len, 9))), replace=False))
            for _ in range(heads)
        ]
        for _ in range(batch)
    ]
    return lists, columns


SHAPES = [
    # q_len, kv_len, heads, kv_heads, block_q, block_kv
    pytest.param((1, 1, 2, 1, 16, 16), id="len1"),
    pytest.param((63, 63, 4, 1, 16, 16), id="len63-mqa"),
    pytest.param((100, 100, 7, 1, 16, 32), id="len100-gqa7"),
    pytest.param((257, 257, 4, 4, 64, 32), id="len257-mha"),
    pytest.param((37, 120, 8, 1, 16, 16), id="chunk37of120-gqa8"),
    pytest.param((64, 200, 4, 2, 32, 64), id="chunk64of200"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_equals_masked_attention(shape, implementation):
    q_len, kv_len, heads, kv_heads, block_q, block_kv = shape
    offset = kv_len - q_len
    blocks = {"block_q": block_q, "block_kv": block_kv}
    rng = np.random.default_rng(sum(shape))
    lists, columns = random_lists(rng, 2, heads, q_len, kv_len, offset=offset, **blocks)
    lengths = np.array([kv_len, max(1, kv_len - 5)])
    q, k, v = random_qkv(1, batch=2, q_len=q_len, kv_len=kv_len, heads=heads, kv_heads=kv_heads)
    index = make_index(lists, columns, **blocks)
    validate(index)
    mask = brute_force_mask(lists, columns, q_len, kv_len, offset=offset, lengths=lengths, **blocks)
    np.testing.assert_array_equal(index.to_mask(q_len, kv_len, lengths=jnp.asarray(lengths)), mask)
    got, lse = block_sparse_attention(
        *map(jnp.asarray, (q, k, v)), index, lengths=jnp.asarray(lengths),
        implementation=implementation, return_residuals=True,
    )  # fmt: skip
    assert_attention_close(got, masked_attention(q, k, v, mask))
    empty = ~mask.any(axis=3)
    assert np.isneginf(np.asarray(lse)[empty]).all()
    assert np.isfinite(np.asarray(lse)[~empty]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_tiles_equal_dense_attention_with_its_log_sum_exp(implementation):
    q, k, v = random_qkv(0, q_len=100, heads=4, kv_heads=2)
    starts = [[[list(range(0, 16 * (i + 1), 16)) for i in range(7)]] * 4]
    index = make_index(starts, [[[]] * 4], block_q=16, block_kv=16)
    got, lse = block_sparse_attention(
        *map(jnp.asarray, (q, k, v)), index, implementation=implementation, return_residuals=True
    )
    mask = np.broadcast_to(causal_mask(100, 100), (1, 4, 100, 100))
    assert_attention_close(got, masked_attention(q, k, v, mask))
    scores = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, 2, axis=2)) / 4.0
    want = np.log(np.where(mask, np.exp(scores), 0.0).sum(axis=3))
    np.testing.assert_allclose(lse, want, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_column_inside_a_tile_counts_once(implementation):
    q, k, v = random_qkv(3, q_len=32, heads=1, kv_heads=1)
    tiles = [[[[0], [0, 16]]]]
    arrays = tuple(map(jnp.asarray, (q, k, v)))
    blocks = {"block_q": 16, "block_kv": 16}
    plain = block_sparse_attention(
        *arrays, make_index(tiles, [[[]]], **blocks), implementation=implementation
    )
    doubled = block_sparse_attention(
        *arrays, make_index(tiles, [[[0, 3, 15, 31]]], **blocks), implementation=implementation
    )
    np.testing.assert_allclose(plain, doubled, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_density_counts_the_mask(seed, implementation):
    blocks = {"block_q": 16, "block_kv": 16}
    lists, columns = random_lists(np.random.default_rng(seed), 2, 3, 40, 72, offset=32, **blocks)
    index = make_index(lists, columns, **blocks)
    # One capacity for all examples, so that they share a program.
    index = dataclasses.replace(
        index,
        entries=jnp.pad(index.entries, ((0, 0), (0, 0), (0, 32 - index.entries.shape[2]))),
        columns=jnp.pad(index.columns, ((0, 0), (0, 0), (0, 9 - index.columns.shape[2]))),
    )
    mask = brute_force_mask(lists, columns, 40, 72, offset=32, lengths=[72, 60], **blocks)
    lengths = np.array([72, 60])
    real = 32 + np.arange(40)[None, :] < lengths[:, None]
    causal = (causal_mask(40, 72)[None] & real[:, :, None]).sum(axis=(1, 2))
    want = (mask & real[:, None, :, None]).sum(axis=(2, 3)) / causal[:, None]
    got = jax.jit(lambda i, n: i.density(40, 72, lengths=n))(index, jnp.asarray(lengths))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_pairs_are_counted_some_query_tiles_at_a_time(monkeypatch):
    index = mixed_index(2, 4, 300, 401, block_kv=128, staggered=True)
    assert index.begin.shape == (2, 4, 3)
    most = max(index.columns.shape[2], min(index.entries.shape[2], 401 // 128 + 4))
    monkeypatch.setattr(index_module, "on_cpu", lambda: False)
    counts = []
    for tiles in (1, 2, 3):
        monkeypatch.setattr(index_module, "_COUNTED", 2 * 4 * most * tiles)
        counts.append(index.visited_pairs(300, 401, lengths=jnp.array([401, 390])))
    mask = np.array(index.to_mask(300, 401, lengths=jnp.array([401, 390])))
    mask[1, :, 289:] = False  # rows that are not real
    for visited, causal in counts:
        np.testing.assert_array_equal(visited, mask.sum(axis=(2, 3)))
        np.testing.assert_array_equal(causal[0], 300 * 101 + 300 * 301 // 2)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (190, 401)])
def test_unstaggered_index_has_the_same_mask(q_len, kv_len):
    index = mixed_index(2, 4, q_len, kv_len, block_kv=128, staggered=True)
    plain = unstagger(index, q_len)
    assert not plain.staggered
    validate(plain)
    np.testing.assert_array_equal(plain.to_mask(q_len, kv_len), index.to_mask(q_len, kv_len))


def test_repetition_is_bitwise_equal():
    q, k, v = map(jnp.asarray, random_qkv(5, q_len=100, heads=2, kv_heads=1))
    index = make_index([[[[0, 16]] * 7] * 2], [[[40, 50]] * 2], block_q=16, block_kv=16)
    run = jax.jit(block_sparse_attention)
    np.testing.assert_array_equal(run(q, k, v, index), run(q, k, v, index))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_error_is_at_most_twice_plain_attentions(dtype):
    q, k, v = random_qkv(6, q_len=200, heads=2, kv_heads=1, head_dim=64)
    low = [jnp.asarray(x, dtype) for x in (q, k, v)]
    exact = [np.asarray(x, np.float32) for x in low]
    mask = np.broadcast_to(causal_mask(200, 200), (1, 2, 200, 200))
    want = masked_attention(*exact, mask)
    plain = jax.nn.dot_product_attention(*low, is_causal=True)
    starts = [[[list(range(0, 32 * (i + 1), 32)) for i in range(7)]] * 2]
    got = block_sparse_attention(*low, make_index(starts, [[[]] * 2], block_q=32, block_kv=32))
    assert got.dtype == dtype
    limit = 2 * np.abs(np.asarray(plain, np.float64) - want).max() + 1e-5
    assert np.abs(np.asarray(got, np.float64) - want).max() <= limit


def _index(**changes):
    index = make_index([[[[0], [0, 16]]]], [[[1, 5]]], block_q=16, block_kv=16)
    return dataclasses.replace(index, **changes)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        pytest.param(
            _index(entries=jnp.asarray([[[0, NO_TILE, 16, 16]]], jnp.int32)),
            "disjoint", id="duplicate-tile",
        ),
        pytest.param(
            _index(entries=jnp.asarray([[[0, NO_TILE, 16, 8]]], jnp.int32)),
            "disjoint", id="overlapping-tiles",
        ),
        pytest.param(
            _index(entries=jnp.asarray([[[4, NO_TILE, 24, 0]]], jnp.int32)),
            "multiples of 8", id="unaligned",
        ),
        pytest.param(
            _index(columns=jnp.asarray([[[5, 5]]], jnp.int32)), "ascending", id="duplicate-column"
        ),
        pytest.param(
            _index(count=jnp.asarray([[[1, 3]]], jnp.int32)), "outside the list", id="long-list"
        ),
    ],
)  # fmt: skip
def test_validate_refuses(index, message):
    with pytest.raises(ValueError, match=message):
        validate(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"q": (1, 32, 3, 16)}, "multiple of", id="heads"),
        pytest.param({"q": (1, 32, 2, 8)}, "head_dim", id="head_dim"),
        pytest.param({"q": (1, 48, 2, 16)}, "q_len <= kv_len", id="q_len"),
        pytest.param({"v": (1, 32, 1, 16)}, "one shape", id="v"),
        pytest.param({"q": (1, 16, 2, 16)}, "query tiles", id="index"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (1, 32, 2, 16), "k": (1, 32, 2, 16), "v": (1, 32, 2, 16)} | change
    index = make_index([[[[0], [0, 16]]] * 2], [[[]] * 2], block_q=16, block_kv=16)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*(jnp.zeros(shape) for shape in shapes.values()), index)


@pytest.mark.usefixtures("as_users_see_it")
def test_lengths_out_of_range_are_refused():
    x = jnp.zeros((1, 32, 1, 16))
    index = make_index([[[[0], [0, 16]]]], [[[]]], block_q=16, block_kv=16)
    with pytest.raises(ValueError, match=r"within 1\.\.32"):
        block_sparse_attention(x, x, x, index, lengths=jnp.array([33]))
    with pytest.raises(ValueError, match="unknown implementation"):
        block_sparse_attention(x, x, x, index, implementation="fast")  # type: ignore[arg-type]
