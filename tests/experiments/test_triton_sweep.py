"""The parts of the Triton sweep that need no GPU: its gate and its count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.latency import triton_sweep
from pallas_kernels.block_sparse_attention import triton, workloads, xla

_LENGTH, _HEADS = 500, 4


def test_gate_tells_right_from_wrong_and_operations_count_tiles():
    index = workloads.vertical_slash_index(
        1, _HEADS, _LENGTH, _LENGTH, vertical=40, slash=60, spread="clustered", staggered=True
    )
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, heads: jax.random.normal(key, (1, _LENGTH, heads, 16))
    q, k, v = (draw(key, heads) for key, heads in zip(keys, (_HEADS, 2, 2), strict=True))
    out, _ = jax.jit(xla.block_sparse_attention)(
        q, k, v, index, lengths=jnp.array([_LENGTH]), q_offset=jnp.int32(0)
    )
    out = np.array(out)
    error = lambda: triton_sweep.tile_error(jnp.asarray(out), q, k, v, index, head=3, tile=3)
    assert error() < 1e-5
    out[0, 499, 3, 0] += 1.0
    assert error() > 1e-2
    # At most one tile of 128 columns is visited besides the key tiles.
    tiles = np.asarray(index.count, np.int64)
    per_tile = 128 * 128 * 4 * 16
    operations = triton_sweep.visited_operations(index, _LENGTH, head_dim=16)
    assert tiles.sum() * per_tile <= operations <= (tiles + 1).sum() * per_tile


def test_configurations_fit_the_rows_that_share_a_list():
    sweep = triton_sweep.TritonSweep()
    for staggered, rows in ((False, 128), (True, 64)):
        index = workloads.vertical_slash_index(
            1, 1, 256, 256, vertical=1, slash=1, spread="contiguous", staggered=staggered
        )
        default, *tried = sweep._configs(index)
        assert default is None
        assert {config.block_m for config in tried} <= {64, rows}
        assert len(set(tried)) == len(tried) > 3


@pytest.mark.skipif(triton._device_capability() is not None, reason="there is a CUDA device")
def test_sweep_says_that_it_needs_a_gpu():
    with pytest.raises(SystemExit, match="CUDA device"):
        triton_sweep.TritonSweep().run()
