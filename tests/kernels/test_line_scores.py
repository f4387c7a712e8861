"""Column and diagonal sums against a numpy brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import line_scores
from pallas_kernels.line_scores import mosaic_gpu, xla

IMPLEMENTATIONS = [
    pytest.param("reference", jnp.float32),
    pytest.param("xla", jnp.float32),
    pytest.param("xla", jnp.bfloat16),
    pytest.param("mosaic_gpu", jnp.bfloat16, marks=pytest.mark.gpu),
    pytest.param("mosaic_gpu", jnp.float16, marks=pytest.mark.gpu),
]


def brute_force(q, k, first, length):
    """One head, row by row in float64."""
    vertical, slash = np.zeros(len(k)), np.zeros(len(k))
    for row, query in enumerate(q.astype(np.float64)):
        position = first + row
        if position >= length:
            continue
        scores = k[: position + 1].astype(np.float64) @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        vertical[: position + 1] += weights
        slash[: position + 1] += weights[::-1]
    return vertical, slash


def random_qk(seed, *, last_q, kv_len, heads=4, kv_heads=2, head_dim=64, dtype=jnp.float32):
    """Queries and keys of two batch rows that are exact in 16 bits."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, last_q, heads, head_dim), np.float32) * 2
    k = rng.standard_normal((2, kv_len, kv_heads, head_dim), np.float32)
    return tuple(jnp.asarray(x).astype(jnp.bfloat16).astype(dtype) for x in (q, k))


def check(got, q, k, first, lengths):
    group = q.shape[2] // k.shape[2]
    q, k = (np.asarray(x, np.float32) for x in (q, k))
    for b, h in np.ndindex(2, q.shape[2]):
        want = brute_force(q[b, :, h], k[b, :, h // group], first[b], lengths[b])
        for name, sums, expected in zip(("vertical", "slash"), got, want, strict=True):
            np.testing.assert_allclose(
                sums[b, h], expected, atol=3e-6, err_msg=f"{name}, row {b}, head {h}"
            )


CASES = [
    pytest.param(1, 1, [1, 1], [0, 0], id="one-token"),
    pytest.param(7, 50, [50, 44], [43, 37], id="short-chunks"),
    pytest.param(64, 200, [200, 150], [136, 86], id="ragged-rows"),
    pytest.param(16, 64, [64, 5], [48, 0], id="row-shorter-than-last-q"),
]


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize(("last_q", "kv_len", "lengths", "first"), CASES)
def test_line_scores_equal_brute_force(
    monkeypatch, implementation, dtype, last_q, kv_len, lengths, first
):
    monkeypatch.setattr(xla, "_CHUNK", 32)
    q, k = random_qk(last_q, last_q=last_q, kv_len=kv_len, dtype=dtype)
    got = line_scores(
        q, k, first=jnp.asarray(first), lengths=jnp.asarray(lengths), implementation=implementation
    )
    check(got, q, k, first, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "kv_len"),
    [(7, 1, 64, 5001), (8, 1, 128, 4096), (4, 4, 96, 2049), (2, 1, 256, 2111)],
)
def test_hopper_kernel_over_several_chunks(heads, kv_heads, head_dim, kv_len):
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    q, k = random_qk(0, last_q=64, kv_len=kv_len, dtype=jnp.bfloat16, **sizes)
    first, lengths = [kv_len - 64, 1980], [kv_len, 2040]
    run = jax.jit(
        lambda q, k: line_scores(
            q, k, first=jnp.asarray(first), lengths=jnp.asarray(lengths),
            implementation="mosaic_gpu",
        )
    )  # fmt: skip
    got = run(q, k)
    check(got, q, k, first, lengths)
    for again, before in zip(run(q, k), got, strict=True):
        np.testing.assert_array_equal(again, before)


@pytest.mark.gpu
def test_hopper_kernel_ignores_padding_bit_for_bit():
    q, k = random_qk(0, last_q=64, kv_len=5000, head_dim=128, dtype=jnp.bfloat16)
    where = {"first": jnp.array([2936, 1000]), "lengths": jnp.array([3000, 1064])}
    padded = k.at[:, 3000:].set(jnp.nan)
    short = line_scores(q, k[:, :3000], implementation="mosaic_gpu", **where)
    long = line_scores(q, padded, implementation="mosaic_gpu", **where)
    for x, y in zip(short, long, strict=True):
        np.testing.assert_array_equal(x, y[..., :3000])
        np.testing.assert_array_equal(y[..., 3000:], 0.0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        pytest.param(32, 8, 128, jnp.bfloat16, id="llama"),
        pytest.param(28, 4, 128, jnp.bfloat16, id="group-of-7"),
        pytest.param(8, 8, 64, jnp.float16, id="no-group-64"),
        pytest.param(8, 4, 96, jnp.bfloat16, id="head-dim-96"),
        pytest.param(8, 1, 256, jnp.float16, id="head-dim-256"),
    ],
)
def test_hopper_kernel_lowers_without_a_gpu(heads, kv_heads, head_dim, dtype):
    shapes = [
        jax.ShapeDtypeStruct((2, length, h, head_dim), dtype)
        for length, h in ((64, heads), (5001, kv_heads))
    ]
    where = jax.ShapeDtypeStruct((2,), jnp.int32)
    run = jax.jit(
        lambda q, k, first, lengths: mosaic_gpu.line_scores(q, k, first=first, lengths=lengths)
    )
    text = run.trace(*shapes, where, where).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2, "one kernel for each pass"


def test_hopper_kernel_in_the_interpreter(monkeypatch):
    """Numbers and races; chunks of two tiles, a row that ends within one, a ragged last tile."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax._src.pallas.mosaic_gpu.interpret import params

    monkeypatch.setattr(mosaic_gpu, "_CHUNK", 128)
    q, k = random_qk(1, last_q=64, kv_len=300, heads=2, kv_heads=1, dtype=jnp.bfloat16)
    first, lengths = [236, 30], [300, 70]
    interpreter.reset_gpu_interpret_mode_state()
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        got = mosaic_gpu.line_scores(q, k, first=jnp.asarray(first), lengths=jnp.asarray(lengths))
        check(got, q, k, first, lengths)
        assert not interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()


def test_sums_are_the_number_of_real_queries():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 64, 2, 16), np.float32))
    k = jnp.asarray(rng.standard_normal((1, 3000, 1, 16), np.float32))
    vertical, slash = line_scores(q, k, first=jnp.array([2900]), lengths=jnp.array([2950]))
    np.testing.assert_allclose(jnp.sum(vertical, axis=2), 50.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(slash, axis=2), 50.0, rtol=1e-5)


def test_line_scores_refuse_heads_that_do_not_group():
    with pytest.raises(ValueError, match="multiple of"):
        line_scores(
            jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 8, 2, 8)), first=jnp.array([4]),
            lengths=jnp.array([8]),
        )  # fmt: skip


def test_an_implementation_that_cannot_serve_says_why():
    q, k = jnp.zeros((1, 4, 2, 64)), jnp.zeros((1, 8, 2, 64))
    where = {"first": jnp.array([4]), "lengths": jnp.array([8])}
    with pytest.raises(NotImplementedError, match=r"needs (a GPU|bfloat16)"):
        line_scores(q, k, implementation="mosaic_gpu", **where)
    assert "bfloat16 or float16, got float32" in mosaic_gpu.unsupported(q, k)
    half = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    long = mosaic_gpu.unsupported(half(1, 65, 2, 64), half(1, 80, 2, 64))
    assert "at most 64 queries, got 65" in long
    assert "got 80" in mosaic_gpu.unsupported(half(1, 4, 2, 80), half(1, 8, 2, 80))
    assert mosaic_gpu.unsupported(half(1, 4, 2, 64), half(1, 8, 2, 64)) is None
