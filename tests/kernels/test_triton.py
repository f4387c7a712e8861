"""The Triton kernel: what it declines, the schedule it reads, lowering, and results on a GPU."""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import reference, triton, workloads
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex


def make_index(starts, columns=(), *, heads=1, batch=1, block_q=128, block_kv=128):
    """Every head the same: for each query tile its tile starts, and the columns."""
    width = max(1, *map(len, starts))
    entries = np.full((len(starts), width), -(2**30), np.int32)
    for row, tiles in enumerate(starts):
        entries[row, : len(tiles)] = tiles
    each = lambda x: jnp.asarray(np.broadcast_to(x, (batch, heads, *np.shape(x))), jnp.int32)
    return BlockSparseIndex(
        entries=each(entries.reshape(-1)),
        begin=each(np.arange(len(starts)) * width),
        count=each(np.array([len(x) for x in starts])),
        origin=each(np.zeros(len(starts))),
        columns=each(np.array(columns)),
        column_count=each(np.array(len(columns))),
        block_q=block_q,
        block_kv=block_kv,
    )


def lines(batch, heads, q_len, kv_len, **kwargs):
    kwargs = {"vertical": 45, "slash": 60, "spread": "clustered"} | kwargs
    return workloads.vertical_slash_index(batch, heads, q_len, kv_len, **kwargs)


def case(name, *, q_len, kv_len=None, heads=1, kv_heads=1, dim=64, dtype="bfloat16", index=None,
         lengths=None, q_offset=None):  # fmt: skip
    kv_len = q_len if kv_len is None else kv_len
    batch = 1 if lengths is None else len(lengths)
    index = index or (lambda: lines(batch, heads, q_len, kv_len))
    lengths = [kv_len] * batch if lengths is None else lengths
    q_offset = kv_len - q_len if q_offset is None else q_offset
    shape = (batch, q_len, kv_len, heads, kv_heads, dim, dtype)
    return pytest.param(shape, index, lengths, q_offset, id=name)


# Query tiles of 100 rows in all: beyond the end, past the diagonal, before key 0 wholly or partly.
ODD_STARTS = [[1024, 128, 0, -128], [168, 40, -88], [], [488, 360, -8, -136, -1000]]

CASES = [
    case("one-token", q_len=1),
    case("63-rows-fp16", q_len=63, heads=4, dtype="float16"),
    case("100-rows-d96", q_len=100, heads=4, kv_heads=1, dim=96),
    case(
        "257-rows-ragged-staggered-gqa7", q_len=257, heads=7, dim=128, lengths=[257, 130],
        index=lambda: lines(2, 7, 257, 257, staggered=True),
    ),
    case("chunk-gqa8", q_len=130, kv_len=1100, heads=8, dim=128),
    case(
        "chunk-with-offset", q_len=130, kv_len=1100, heads=2, dim=128, q_offset=301,
        index=lambda: workloads.block_sparse_index(1, 2, 130, 431, blocks=3),
    ),
    case(
        "blocks-d96-fp16", q_len=1000, heads=2, kv_heads=2, dim=96, dtype="float16",
        lengths=[1000, 5], index=lambda: workloads.block_sparse_index(2, 2, 1000, 1000, blocks=4),
    ),
    case(
        "dense-gqa4", q_len=1000, heads=8, kv_heads=2, dim=128,
        index=lambda: workloads.dense_index(1, 8, 1000, 1000),
    ),
    case(
        "dense-d256", q_len=520, heads=2, dim=256, lengths=[520, 333],
        index=lambda: workloads.dense_index(2, 2, 520, 520),
    ),
    case(
        "small-tiles", q_len=400, heads=2, dim=64,
        index=lambda: lines(1, 2, 400, 400, block_q=64, block_kv=64),
    ),
    case(
        "tiles-of-192-keys", q_len=600, heads=2, dim=128,
        index=lambda: lines(1, 2, 600, 600, block_kv=192),
    ),
    case(
        "staggered-d256", q_len=600, heads=2, dim=256,
        index=lambda: lines(1, 2, 600, 600, staggered=True),
    ),
    case("no-key-at-all", q_len=200, heads=2, index=lambda: make_index([[], []], heads=2)),
    case(
        "columns-only", q_len=300, dim=128, lengths=[300, 290],
        index=lambda: make_index([[], [], []], [0, 127, 128, 289, 290, 299], batch=2),
    ),
    case(
        "odd-starts", q_len=500, dim=128,
        index=lambda: make_index(ODD_STARTS, [0, 1, 39, 40, 100, 300, 400, 499]),
    ),
]  # fmt: skip
PARAMETERS = ("shape", "index", "lengths", "q_offset")


def inputs(shape, lengths):
    """Random q, k, v; keys and values past a row's length are NaN."""
    batch, q_len, kv_len, heads, kv_heads, dim, dtype = shape
    rng = np.random.default_rng(q_len)
    draw = lambda n, h: jnp.asarray(rng.standard_normal((batch, n, h, dim), np.float32)).astype(
        dtype
    )
    q, k, v = draw(q_len, heads), draw(kv_len, kv_heads), draw(kv_len, kv_heads)
    padding = np.arange(kv_len)[None, :] >= np.asarray(lengths)[:, None]
    hide = lambda x, fill: jnp.where(padding[:, :, None, None], jnp.asarray(fill, x.dtype), x)
    return (q, hide(k, jnp.nan), hide(v, jnp.nan)), (q, hide(k, 0), hide(v, 0))


def plain_attention(q, k, v, mask):
    """What rounding costs ordinary 16-bit attention: scores and weights in float32."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[3] ** -0.5, -jnp.inf)
    weights = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1)).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def attend(q, k, v, index, lengths, q_offset):
    # Freed memory full of NaN is what the outputs are likely to be given.
    jax.block_until_ready([jnp.full(q.shape, jnp.nan, q.dtype) for _ in range(8)])
    return jax.jit(triton.block_sparse_attention)(
        q, k, v, index, lengths=jnp.asarray(lengths), q_offset=jnp.int32(q_offset)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(PARAMETERS, CASES)
def test_output_is_as_close_as_plain_attention(shape, index, lengths, q_offset):
    index = index()
    poisoned, clean = inputs(shape, lengths)
    out, lse = attend(*poisoned, index, lengths, q_offset)
    again = attend(*poisoned, index, lengths, q_offset)
    options = {"lengths": jnp.asarray(lengths), "q_offset": jnp.int32(q_offset)}
    want, want_lse = reference.block_sparse_attention(*clean, index, **options)
    mask = index.to_mask(shape[1], shape[2], **options)
    plain = plain_attention(*clean, mask)
    out32, plain = (np.asarray(x, np.float32) for x in (out, plain))
    want, lse, want_lse = (np.asarray(x) for x in (want, lse, want_lse))
    assert out.dtype == clean[0].dtype
    assert np.isfinite(out32).all()
    assert np.abs(out32 - want).max() <= 2 * np.abs(plain - want).max() + 1e-6
    rms = lambda x: np.sqrt(np.mean(x**2))
    assert rms(out32 - want) <= (4e-3 if shape[6] == "bfloat16" else 1e-3) * rms(want) + 1e-9
    seen = np.isfinite(want_lse)
    assert (lse[~seen] == -np.inf).all()
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(
        np.asarray(again[0]).view(np.int16), np.asarray(out).view(np.int16)
    )
    np.testing.assert_array_equal(np.asarray(again[1]), lse)


@pytest.mark.gpu
def test_a_million_tokens_are_addressed_right():
    n, heads, kv_heads, dim = 2**20, 32, 8, 128
    index = workloads.a_shape_index(1, heads, n, n, sink=100, window=1000)
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, h: jax.random.normal(key, (1, n, h, dim), jnp.bfloat16)
    q, k, v = draw(keys[0], heads), draw(keys[1], kv_heads), draw(keys[2], kv_heads)
    out, lse = attend(q, k, v, index, [n], 0)
    for head, tile in ((0, 0), (31, 4099), (31, n // 128 - 1)):
        rows = slice(tile * 128, (tile + 1) * 128)
        low = max(0, tile * 128 - 1408)
        keys = np.concatenate([np.arange(min(low, 256)), np.arange(low, (tile + 1) * 128)])
        begin, count, origin = (
            int(getattr(index, x)[0, head, tile]) for x in ("begin", "count", "origin")
        )
        starts = origin + np.asarray(index.entries[0, head, begin : begin + count])
        seen = ((keys[:, None] >= starts) & (keys[:, None] < starts + 128)).any(1) | (keys < 100)
        mask = seen[None, :] & (keys[None, :] <= np.arange(rows.start, rows.stop)[:, None])
        pick = lambda x, h, at: np.asarray(x[0, at, h], np.float64)
        scores = pick(q, head, rows) @ pick(k, head // 4, keys).T / np.sqrt(dim)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want = weights @ pick(v, head // 4, keys) / weights.sum(1, keepdims=True)
        got = pick(out, head, rows)
        assert np.sqrt(np.mean((got - want) ** 2)) <= 4e-3 * np.sqrt(np.mean(want**2))
        want_lse = scores.max(1) + np.log(weights.sum(1))
        np.testing.assert_allclose(lse[0, head, rows], want_lse, atol=1e-3)


def visited_by_schedule(index, lists, ids, bits, q_len, kv_len):
    """The mask the kernel follows, read off its own scalars in numpy."""
    batch, heads, tiles, _ = lists.shape
    mask = np.zeros((batch, heads, tiles * index.block_q, kv_len), np.int32)
    for b, h, t in np.ndindex(batch, heads, tiles):
        begin, count, origin, front, tail, first_row, length, columns = lists[b, h, t]
        rows = mask[b, h, t * index.block_q : (t + 1) * index.block_q]
        position = first_row + np.arange(index.block_q)[:, None]
        for j in range(count):
            key = origin + index.entries[b, h, begin + j] + np.arange(index.block_kv)
            edge = j < front or j >= count - tail
            visible = (key >= 0) & (key < length) & (key <= position)
            assert edge or visible.all(), "an unmasked tile holds a key that a row may not see"
            inside = (key >= 0) & (key < kv_len)
            rows[:, key[inside]] += visible[:, inside]
        for c in range(columns):
            if bits[b, h, t, c // 32] >> (c % 32) & 1:
                rows[:, ids[b, h, c]] += ids[b, h, c] <= position[:, 0]
    return mask[:, :, :q_len]


@pytest.mark.parametrize(PARAMETERS, [x for x in CASES if "d256" not in x.id])
def test_schedule_visits_each_key_of_the_mask_once(shape, index, lengths, q_offset):
    index = index()
    q_len, kv_len = shape[1:3]
    options = {"lengths": jnp.asarray(lengths), "q_offset": jnp.int32(q_offset)}
    plain = triton.unstagger(index, q_len)
    lists, (ids, bits) = triton._schedule(plain, options["lengths"], options["q_offset"])
    arrays = jax.tree.map(np.asarray, (plain, lists, ids, bits))
    got = visited_by_schedule(*arrays, q_len, kv_len)
    np.testing.assert_array_equal(got, index.to_mask(q_len, kv_len, **options))


def abstract(dtype=jnp.bfloat16, dim=64, block_kv=128, block_q=128, staggered=False):
    q = jax.ShapeDtypeStruct((1, 300, 4, dim), dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, dim), dtype)
    index = workloads.vertical_slash_index(
        1, 4, 300, 300, vertical=9, slash=30, spread="scattered", block_kv=block_kv,
        block_q=block_q, staggered=staggered,
    )  # fmt: skip
    return q, k, k, index


def trace(arrays, compute_capability):
    def run(q, k, v, index, lengths, q_offset):
        return triton.block_sparse_attention(
            q, k, v, index, lengths=lengths, q_offset=q_offset,
            compute_capability=compute_capability,
        )  # fmt: skip

    lengths, q_offset = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1,), ()))
    return jax.jit(run).trace(*arrays, lengths, q_offset)


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        pytest.param({"dtype": jnp.float32}, 80, "bfloat16 or all in float16", id="dtype"),
        pytest.param({"dim": 32}, 80, r"head_dim .* got 32", id="head-dim"),
        pytest.param({"block_kv": 24}, 80, "`block_kv` to be a multiple of 32", id="block-kv"),
        pytest.param({"block_q": 24}, 80, "`block_q` to be a multiple of 16", id="block-q"),
        pytest.param({}, 75, r"capability 8.0 or later, the device has 7.5", id="turing"),
    ],
)
def test_declines_what_it_cannot_serve(changes, capability, reason):
    with pytest.raises(NotImplementedError, match=reason):
        trace(abstract(**changes), capability)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default device is a GPU")
def test_declines_the_cpu():
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract())
    assert "needs a CUDA device" in triton.unsupported(*arrays)
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        trace(abstract(), None)


def test_declines_without_jax_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match="needs the packages `jax-triton` and `triton`"):
        trace(abstract(), 80)


def test_importing_it_imports_nothing_heavy():
    assert not {"triton", "jax_triton"} & set(vars(triton))


@pytest.mark.skipif(
    not (importlib.util.find_spec("jax_triton") and importlib.util.find_spec("jax_cuda13_plugin")),
    reason="lowering for CUDA needs jax-triton and JAX's CUDA plugin",
)
@pytest.mark.parametrize("dim", triton.HEAD_DIMS)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_lowers_for_cuda_without_a_gpu(capability, dim):
    for staggered in (False, True):
        arrays = abstract(jnp.float16 if staggered else jnp.bfloat16, dim, staggered=staggered)
        lowered = trace(arrays, capability).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("triton_kernel_call") == 1


def test_configs_shrink_where_shared_memory_is_small():
    at = lambda capability: triton.default_config(256, 128, capability)
    assert at(86) == at(89) == at(120) != at(80) == at(90)
    assert dataclasses.asdict(at(86))["block_m"] < dataclasses.asdict(at(80))["block_m"]
