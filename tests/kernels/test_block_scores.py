"""Scores of mean keys against a numpy brute force."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_scores
from pallas_kernels.block_scores import measure, mosaic_gpu, xla
from tests.kernels.mgpu_interpret import interpreted

IMPLEMENTATIONS = [
    pytest.param("reference", jnp.float32),
    pytest.param("xla", jnp.float32),
    pytest.param("xla", jnp.bfloat16),
    pytest.param("mosaic_gpu", jnp.bfloat16, marks=pytest.mark.gpu),
    pytest.param("mosaic_gpu", jnp.float16, marks=pytest.mark.gpu),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes, how many means each tile sees, and where the real rows end."""

    name: str
    rows: int
    tile_rows: int
    num_means: int
    real_rows: tuple[int, ...]
    heads: tuple[int, int, int] = (1, 2, 1)
    head_dim: int = 64
    first: int = 0
    """Means that the first tile sees."""

    def build(self, dtype=jnp.bfloat16, seed=0):
        """Queries (NaN after the real ones) and means that are exact in 16 bits; the rest."""
        rng = np.random.default_rng(seed)
        batch, (kv_heads, lists, members) = len(self.real_rows), self.heads
        draw = lambda *shape: rng.standard_normal(shape, np.float32)
        q = 2 * draw(batch, self.rows, kv_heads, lists, members, self.head_dim)
        means = draw(batch, kv_heads, self.num_means, self.head_dim)
        for b, real in enumerate(self.real_rows):
            q[b, real:] = np.nan
        tiles = -(-self.rows // self.tile_rows)
        past = np.linspace(self.first, self.num_means, tiles).astype(np.int32)
        exact = lambda x: jnp.asarray(x).astype(jnp.bfloat16).astype(dtype)
        return (exact(q), exact(means)), {
            "past": jnp.asarray(past), "real_rows": jnp.asarray(self.real_rows, jnp.int32),
            "tile_rows": self.tile_rows,
        }  # fmt: skip


def brute_force(q, means, *, past, real_rows, tile_rows):
    """Row by row in float64."""
    q, means = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, means))
    batch, rows, kv_heads, lists, members, head_dim = q.shape
    out = np.zeros((batch, kv_heads, lists, len(past), means.shape[2]))
    for b, row, kv, i, member in np.ndindex(batch, rows, kv_heads, lists, members):
        tile = row // tile_rows
        if row >= real_rows[b] or past[tile] == 0:
            continue
        scores = means[b, kv, : past[tile]] @ q[b, row, kv, i, member] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[b, kv, i, tile, : past[tile]] += weights / weights.sum()
    return out


CASES = [
    Case(name="one-row-one-mean", rows=1, tile_rows=128, num_means=1, real_rows=(1,)),
    Case(name="tiles-of-8", rows=61, tile_rows=8, num_means=9, real_rows=(61, 33), first=2),
    Case(name="members", rows=40, tile_rows=16, num_means=70, real_rows=(40,), heads=(2, 1, 3)),
    Case(name="odd-tile", rows=50, tile_rows=12, num_means=140, real_rows=(50, 0)),
    Case(name="large-tile", rows=300, tile_rows=200, num_means=30, real_rows=(290,), first=9),
]
_name = lambda case: case.name


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_block_scores_equal_brute_force(monkeypatch, implementation, dtype, case):
    monkeypatch.setattr(xla, "_ELEMENTS", 2**13)  # several steps of XLA, the last one short
    arrays, options = case.build(dtype)
    tile_rows = options["tile_rows"]
    run = jax.jit(
        lambda q, means, past, real_rows: block_scores(
            q, means, past=past, real_rows=real_rows, tile_rows=tile_rows,
            implementation=implementation,
        )
    )  # fmt: skip
    got = run(*arrays, options["past"], options["real_rows"])
    np.testing.assert_allclose(got, brute_force(*arrays, **options), atol=3e-6, rtol=5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(name="d128", rows=1000, tile_rows=128, num_means=300, real_rows=(1000, 413),
             heads=(2, 4, 1), head_dim=128),
        Case(name="d128-shared", rows=512, tile_rows=32, num_means=1000, real_rows=(509,),
             heads=(2, 1, 4), head_dim=128, first=100),
        Case(name="d64", rows=900, tile_rows=128, num_means=1, real_rows=(900,), first=1),
        Case(name="d64-pooled", rows=700, tile_rows=8, num_means=5003, real_rows=(699, 8),
             first=4000),
        Case(name="d96", rows=300, tile_rows=16, num_means=515, real_rows=(300,), head_dim=96),
        Case(name="d128-large-tile", rows=777, tile_rows=256, num_means=640, real_rows=(770,),
             head_dim=128, first=640),
    ],
    ids=_name,
)  # fmt: skip
def test_hopper_kernel_equals_the_reference(dtype, case):
    arrays, options = case.build(dtype)
    run = jax.jit(
        lambda q, means, past, real_rows, name: block_scores(
            q, means, past=past, real_rows=real_rows, tile_rows=case.tile_rows, implementation=name
        ),
        static_argnames="name",
    )
    where = options["past"], options["real_rows"]
    got = run(*arrays, *where, name="mosaic_gpu")
    want = run(*arrays, *where, name="reference")
    np.testing.assert_allclose(got, want, atol=3e-6, rtol=5e-5)
    np.testing.assert_array_equal(run(*arrays, *where, name="mosaic_gpu"), got)
    # A tile's scores do not depend on means that it does not see, nor on their number.
    unseen = jnp.arange(case.num_means + 200)[None, None, :, None] >= case.num_means
    more = jnp.pad(arrays[1], ((0, 0), (0, 0), (0, 200), (0, 0)))
    padded = run(arrays[0], jnp.where(unseen, jnp.nan, more), *where, name="mosaic_gpu")
    np.testing.assert_array_equal(padded[..., : case.num_means], got)
    np.testing.assert_array_equal(padded[..., case.num_means :], 0.0)
    # No more means are seen, nor scores written, than there are.
    too_many, all_means = (jnp.full_like(where[0], n) for n in (10**6, case.num_means))
    beyond = run(*arrays, too_many, where[1], name="mosaic_gpu")
    np.testing.assert_array_equal(beyond, run(*arrays, all_means, where[1], name="mosaic_gpu"))


@pytest.mark.parametrize(
    ("tile_rows", "heads", "head_dim", "dtype"),
    [
        pytest.param(128, (8, 4, 1), 128, jnp.bfloat16, id="llama"),
        pytest.param(8, (8, 1, 4), 128, jnp.bfloat16, id="pooled-shared"),
        pytest.param(12, (4, 7, 1), 64, jnp.float16, id="odd-tile-64"),
        pytest.param(256, (2, 2, 1), 96, jnp.bfloat16, id="large-tile-96"),
    ],
)
def test_hopper_kernel_lowers_without_a_gpu(tile_rows, heads, head_dim, dtype):
    tiles = -(-5001 // tile_rows)
    shapes = [
        jax.ShapeDtypeStruct((2, 5001, *heads, head_dim), dtype),
        jax.ShapeDtypeStruct((2, heads[0], 333, head_dim), dtype),
        jax.ShapeDtypeStruct((tiles,), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    ]
    run = lambda q, means, past, real_rows: mosaic_gpu.block_scores(
        q, means, past=past, real_rows=real_rows, tile_rows=tile_rows
    )
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1, "one launch serves all heads"


def test_hopper_kernel_in_the_interpreter():
    """Numbers and races; two blocks, a stage without a mask and one with, rows without means."""
    case = Case(name="", rows=260, tile_rows=50, num_means=200, real_rows=(259, 0), first=130,
                heads=(1, 1, 1))  # fmt: skip
    arrays, options = case.build()
    with interpreted() as races_found:
        got = np.asarray(mosaic_gpu.block_scores(*arrays, **options))
        assert not races_found()
    np.testing.assert_allclose(got, brute_force(*arrays, **options), atol=3e-6, rtol=5e-5)


def test_a_step_of_xla_holds_a_bounded_number_of_weights():
    # All weights at once would be 8192 rows x 4096 means for each of 8 heads: 1 GB.
    sds = jax.ShapeDtypeStruct
    shapes = [sds((1, 8192, 2, 4, 1, 16), jnp.float32), sds((1, 2, 4096, 16), jnp.float32)]
    run = jax.jit(lambda q, means, past, real_rows: xla.block_scores(
        q, means, past=past, real_rows=real_rows, tile_rows=128
    ))  # fmt: skip
    compiled = run.lower(*shapes, sds((64,), jnp.int32), sds((1,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    (q, means), options = CASES[1].build()
    call = lambda q, means, **changed: block_scores(q, means, **options | changed)
    with pytest.raises(ValueError, match=r"must agree, got shapes .*\(2, 2, 9, 64\)"):
        call(q, jnp.concatenate([means, means], axis=1))
    with pytest.raises(ValueError, match="an axis is empty"):
        call(q[:, :0], means)
    with pytest.raises(ValueError, match=r"each tile of 16 of the 61 rows, got shape \(8,\)"):
        call(q, means, tile_rows=16)
    with pytest.raises(ValueError, match=r"must have shape \(2,\), got \(1,\)"):
        call(q, means, real_rows=jnp.array([3]))
    with pytest.raises(NotImplementedError, match=r"needs (a GPU|bfloat16)"):
        call(*(x.astype(jnp.float32) for x in (q, means)), implementation="mosaic_gpu")
    assert mosaic_gpu.unsupported(q, means) is None
    assert "and float32" in mosaic_gpu.unsupported(q, means.astype(jnp.float32))
    wide = jnp.zeros((1, 1, 1, 1, 1, 256), jnp.bfloat16)
    assert "got 256" in mosaic_gpu.unsupported(wide, wide)


_TINY = "--lengths 700 --heads 4 --kv-heads 2 --head-dim 16 --pooled 16 --implementations xla"


def test_measure_writes_a_record_of_a_checked_implementation(tmp_path, monkeypatch):
    output = tmp_path / "times.jsonl"
    measure.main([*_TINY.split(), "--output", str(output)])
    (record,) = map(json.loads, output.read_text().splitlines())
    assert record["name"] == "xla"
    assert record["ms"] > 0
    assert record["error"] < 1e-5
    right = xla.block_scores
    monkeypatch.setattr(xla, "block_scores", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    with pytest.raises(SystemExit, match="xla is wrong"):
        measure.main(_TINY.split())
