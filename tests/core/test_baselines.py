"""Baselines of the paper against element-by-element definitions in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.baselines import window
from minference_jax.search.cost import work_of
from pallas_kernels.block_sparse_attention import mosaic_gpu
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv


@jax.jit
def observe(attention, q, k, v, lengths=None, q_offset=None):
    return mj.observe_density(attention, q, k, v, lengths=lengths, q_offset=q_offset)


def check(attention, qkv, masks, lengths, offset):
    """Output of real rows and numbers of pairs, against masks [batch, heads, q_len, kv_len]."""
    out, pairs = observe(attention, *map(jnp.asarray, qkv), jnp.array(lengths), jnp.int32(offset))
    want = masked_attention(*qkv, masks)
    for b, length in enumerate(lengths):
        rows = length - offset
        assert_attention_close(out[b : b + 1, :rows], want[b : b + 1, :rows])
        np.testing.assert_array_equal(pairs.visited[b], masks[b, :, :rows].sum(axis=(1, 2)))
        causal = causal_mask(*masks.shape[2:], offset)[:rows]
        np.testing.assert_array_equal(pairs.causal[b], causal.sum())


def streaming_mask(q_len, kv_len, offset, length, first, local, dilated, interval):
    mask = np.zeros((q_len, kv_len), bool)
    for row in range(q_len):
        position = offset + row
        mask[row, : min(first, position + 1)] = True
        for distance in range(position + 1):
            gap = distance - local
            near = distance < local
            mask[row, position - distance] |= near or (gap < dilated and gap % (interval + 1) == 0)
    mask[:, length:] = False
    return mask


# first keys, local, dilated, interval; then keys, queries, the first query's position, real keys.
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        pytest.param((13, 0, 67, 1), (150, 150, 0, (150, 121)), id="dilated"),
        pytest.param((13, 29, 71, 1), (211, 97, 101, (198, 103)), id="strided-chunk"),
        pytest.param((0, 24, 107, 2), (173, 173, 0, (173, 1)), id="two-left-out"),
        pytest.param((40, 0, 500, 3), (117, 61, 33, (94, 60)), id="longer-than-prompt"),
        pytest.param((50, 25, 50, 1), (31, 31, 0, (31, 5)), id="first-keys-alone"),
    ],
)
def test_streaming_visits_exactly_its_keys(sizes, shape):
    kv_len, q_len, offset, lengths = shape
    first, local, dilated, interval = sizes
    attention = mj.DilatedStreaming(
        global_size=first, local_size=local, dilated_size=dilated, interval=interval, block_q=16,
        block_kv=8,
    )  # fmt: skip
    qkv = random_qkv(kv_len, batch=2, q_len=q_len, kv_len=kv_len)
    masks = [streaming_mask(q_len, kv_len, offset, length, *sizes) for length in lengths]
    check(attention, qkv, np.repeat(np.stack(masks)[:, None], 4, axis=1), lengths, offset)


@pytest.mark.parametrize(
    ("attention", "keys"),
    [(mj.streaming_dilated(), 1024 + 8192 // 2), (mj.streaming_strided(), 1024 + 2048 + 4096 // 2)],
    ids=["dilated", "strided"],
)
def test_the_papers_sizes(attention, keys):
    q, k, v = map(jnp.asarray, random_qkv(0, q_len=1, kv_len=10_001, heads=1, kv_heads=1))
    pairs = jax.jit(lambda *qkv: attention.attend(*qkv)[1])(q, k, v)
    assert pairs.visited[0, 0] == keys
    # One query tile of 128 rows, and no more than two key tiles too many for each end of a part.
    assert 128 * keys <= pairs.executed[0, 0] <= 128 * (keys + 5 * 2 * 128)


@pytest.mark.parametrize(
    "attention", [mj.streaming_dilated(1024, 4096), mj.TopKAttention(9)], ids=["window", "top-k"]
)
def test_work_is_counted_as_that_of_patterns(attention):
    length = 1024
    qkv = [jnp.zeros((1, length, 2, 16))] * 3
    pairs = jax.jit(lambda *qkv: attention.attend(*qkv)[1])(*qkv)
    work = work_of(pairs, length, None, "flops")
    # Windows that hold everything execute dense attention's tiles; top-k every score of all rows.
    tiles = 8 * 9 / 2 if isinstance(attention, mj.DilatedStreaming) else 8 * 8
    np.testing.assert_array_equal(work.dense, 2 * [8 * 9 / 2 * 128**2])
    np.testing.assert_array_equal(work.sparse, 2 * [tiles * 128**2])


def test_streaming_lowers_for_cuda_without_a_gpu(monkeypatch):
    calls = []

    def attend(q, k, v, index, *, lengths, q_offset, **_):
        assert mosaic_gpu.unsupported(q, k, v, index) is None
        calls.append(q.shape)
        return mosaic_gpu.block_sparse_attention(q, k, v, index, lengths=lengths, q_offset=q_offset)

    monkeypatch.setattr(window, "block_sparse_attention", attend)
    attention = mj.DilatedStreaming(global_size=100, local_size=0, dilated_size=600)
    q, k = (jnp.zeros((2, n, h, 128), jnp.bfloat16) for n, h in ((1500, 4), (2000, 2)))
    run = jax.jit(functools.partial(mj.DilatedStreaming.__call__, attention))
    text = run.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert len(calls) == 3  # first keys, then both ends of the window
    assert "@mosaic_gpu_v2" in text


@pytest.mark.gpu
@pytest.mark.parametrize("local", [0, 300])
def test_streaming_on_a_gpu(local):
    q_len, kv_len, offset, length = 700, 1500, 777, 1450
    attention = mj.DilatedStreaming(global_size=50, local_size=local, dilated_size=600)
    qkv = random_qkv(1, q_len=q_len, kv_len=kv_len, head_dim=128)
    at = {"lengths": jnp.array([length]), "q_offset": jnp.int32(offset)}
    out = jax.jit(attention)(*(jnp.asarray(x, jnp.bfloat16) for x in qkv), **at)
    mask = streaming_mask(q_len, kv_len, offset, length, 50, local, 600, 1)
    want = masked_attention(*qkv, np.broadcast_to(mask, (1, 4, *mask.shape)))
    rows = length - offset
    np.testing.assert_allclose(out[:, :rows].astype(jnp.float32), want[:, :rows], atol=0.02)


@pytest.mark.usefixtures("as_users_see_it")
def test_sizes_that_cannot_be_are_explained():
    q, k, _ = random_qkv(0, q_len=600)
    attention = mj.DilatedStreaming(global_size=4, local_size=254, dilated_size=0)
    with pytest.raises(ValueError, match=r"at least 255 keys .* got 254"):
        jax.eval_shape(attention, q, k, k)
    with pytest.raises(ValueError, match=r"at least 255 keys .* got 254: take at least 510 tokens"):
        jax.eval_shape(mj.streaming_dilated(4, 508), q, k, k)
    with pytest.raises(ValueError, match="a row must see itself"):
        mj.DilatedStreaming(global_size=4, local_size=0, dilated_size=0)
    with pytest.raises(ValueError, match="`interval` must be at least 0, got -1"):
        mj.streaming_strided(interval=-1)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        mj.TopKAttention(0)


def top_k_masks(q, k, offset, lengths, budget):
    batch, q_len, heads, _ = q.shape
    masks = np.zeros((batch, heads, q_len, k.shape[1]), bool)
    for b, head, row in np.ndindex(batch, heads, q_len):
        position = offset + row
        end = min(position + 1, lengths[b])
        keys = k[b, :end, head // (heads // k.shape[2])].astype(np.float64)
        masks[b, head, row, np.argsort(-keys @ q[b, row, head], kind="stable")[:budget]] = True
        if position < lengths[b]:
            masks[b, head, row, position] = True
    return masks


@pytest.mark.parametrize("scale", [1.0, 100.0])  # scores far apart: most weights are 0
def test_top_k_sees_the_largest_scores_and_itself(scale):
    offset, lengths = 21, (83, 50)
    q, k, v = random_qkv(2, batch=2, q_len=62, kv_len=90)
    q = np.float32(scale) * q
    masks = top_k_masks(q, k, offset, lengths, 7)
    check(mj.TopKAttention(7, rows=20), (q, k, v), masks, lengths, offset)


def vertical_slash(*budgets, **kwargs):
    pattern = [
        mj.VerticalSlash(vertical_size=v, slash_size=s, sink_size=2, window_size=3)
        for v, s in budgets
    ]
    return mj.SparseAttention(
        mj.HeadPatterns.from_grid([pattern], max_columns=32), 16, 16, **kwargs
    ).layer(0)


def test_static_lines_are_those_of_the_calibration_prompt():
    sparse = vertical_slash((5, 7), (9, 4), (20, 3), (3, 12), dense_above=None)
    extract = jax.jit(functools.partial(mj.static_lines, max_distances=16))
    q, k, v = map(jnp.asarray, random_qkv(5, q_len=150))
    attend = jax.jit(lambda attention, *qkv, lengths: attention.attend(*qkv, lengths=lengths))
    static = mj.StaticAttention(sparse, extract(q, k, sparse.patterns))
    want, index = attend(sparse, q, k, v, lengths=jnp.array([150]))
    got, same = attend(static, q, k, v, lengths=jnp.array([150]))
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, same, index)

    # Neither queries nor keys of another prompt change them; those beyond its end fall away.
    index = attend(static, q, -k, v, lengths=jnp.array([90]))[1]
    for head, columns in enumerate(np.asarray(static.lines.columns)):
        used = np.asarray(index.columns[0, head, : index.column_count[0, head]])
        np.testing.assert_array_equal(used, columns[columns < 90])
        assert len(used) > 0
    assert np.any((np.asarray(static.lines.columns) >= 90) & (static.lines.columns < 150))
    distances = np.asarray(static.lines.distances)
    np.testing.assert_array_equal(np.sum(distances < 150, axis=1), [7, 4, 3, 12])


def static_on_another_prompt(length):
    pattern = mj.VerticalSlash(vertical_size=40, slash_size=12, sink_size=4, window_size=8)
    patterns = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=4)
    sparse = mj.SparseAttention(patterns, dense_above=None, break_even=0).layer(0)
    q, k, _ = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(8, q_len=length, head_dim=128))
    return mj.StaticAttention(sparse, mj.static_lines(q, k, sparse.patterns, max_distances=16))


def inf_llm(length):
    sizes = mj.InfLLM(n_local=256, topk=1, exc_block=256)
    return mj.AdaptiveAttention(sizes, mj.Layout(shared=True))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [static_on_another_prompt, inf_llm])
def test_the_keys_that_are_told_are_seen_on_a_gpu(make):
    length, padded = 2950, 3000
    qkv = random_qkv(7, q_len=padded, head_dim=128)
    lengths = jnp.array([length])
    attend = jax.jit(lambda attention, *qkv: attention.attend(*qkv, lengths=lengths))
    out, index = attend(make(length), *(jnp.asarray(x, jnp.bfloat16) for x in qkv))
    mask = np.array(index.to_mask(padded, padded, lengths=lengths))[:, :, :length]
    assert 0.05 < mask.sum() / (4 * length * (length + 1) / 2) < 0.9
    want = masked_attention(qkv[0][:, :length], *qkv[1:], mask)
    np.testing.assert_allclose(out[:, :length].astype(jnp.float32), want, atol=0.02)


@pytest.mark.usefixtures("as_users_see_it")
def test_misused_static_lines_are_explained():
    q, k, v = random_qkv(0, batch=2, q_len=20)
    sparse = vertical_slash((5, 7), (5, 7), (5, 7), (5, 7))
    with pytest.raises(ValueError, match="one calibration prompt, got a batch of 2"):
        mj.static_lines(q, k, sparse.patterns, max_distances=8)
    lines = mj.StaticLines(np.zeros((3, 4), int), np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="the lines are for 3 heads, but `q` has 4"):
        mj.StaticAttention(sparse, lines)(q, k, v)
    with pytest.raises(ValueError, match=r"take one `layer\(i\)`"):
        mj.StaticAttention(sparse, jax.tree.map(lambda x: x[None], lines))(q, k, v)
