"""Records, measures and pictures on inputs small enough to work out by hand."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.common.measure import agreement, peak_memory
from experiments.common.plotting import density_picture, mask_picture, visited_shares
from experiments.common.programs import Programs
from experiments.common.record import append_record, read_records
from pallas_kernels.common.dispatch import used_implementations


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3


def test_records_are_appended_and_read_back(tmp_path):
    path = tmp_path / "a" / "b.jsonl"
    for kind in ("one", "two"):
        result = {"array": np.eye(2), "number": np.float32(0.5), "device": jnp.arange(2)}
        append_record(path, kind=kind, argv=["x", "--y"], config=Config(), result=result)
    [second] = read_records(path, kind="two")
    assert len(read_records(path)) == 2
    assert second["result"] == {"array": [[1, 0], [0, 1]], "number": 0.5, "device": [0, 1]}
    assert second["config"] == {"size": 3}
    assert second["environment"]["argv"] == ["x", "--y"]
    assert second["environment"]["implementations"] == used_implementations()


def test_record_refuses_what_is_not_data_and_what_is_not_finite(tmp_path):
    for value in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            append_record(
                tmp_path / "r", kind="k", argv=[], config=Config(), result={"value": value}
            )
    assert not (tmp_path / "r").exists()


def test_records_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"schema": 0, "kind": "k"}) + "\n")
    with pytest.raises(ValueError, match="line 1: expected a record of schema 1, got 0"):
        read_records(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_records(path)


def test_agreement_of_known_distributions():
    dense = np.log(np.array([0.5, 0.25, 0.25], np.float32)) + 7
    other = np.log(np.array([0.25, 0.5, 0.25], np.float32))
    found = agreement(dense, other)
    assert not found.top1_equal
    assert found.kl == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert found.total_variation == pytest.approx(0.25, abs=1e-6)
    same = agreement(dense, dense + 3)
    assert same.top1_equal
    assert same.kl == pytest.approx(0, abs=1e-9)


def test_peak_memory_sees_an_allocation():
    block = np.ones(50_000_000, np.uint8)
    assert peak_memory() > block.nbytes


@pytest.mark.parametrize(
    ("q_len", "kv_len", "cells"), [(7, 7, 7), (7, 7, 3), (5, 11, 4), (100, 100, 13)]
)
def test_visited_shares_against_counting(q_len, kv_len, cells):
    rng = np.random.default_rng(q_len + cells)
    causal = np.arange(kv_len)[None, :] <= kv_len - q_len + np.arange(q_len)[:, None]
    visited = (rng.random((q_len, kv_len)) < 0.4) & causal
    shares = visited_shares(visited, cells)
    step = -(-max(q_len, kv_len) // cells)
    for row, column in np.ndindex(*shares.shape):
        cell = np.s_[row * step : (row + 1) * step, column * step : (column + 1) * step]
        possible = causal[cell].sum()
        if possible:
            assert shares[row, column] == pytest.approx(visited[cell].sum() / possible)
        else:
            assert np.isnan(shares[row, column])


def test_mask_picture_shows_visited_future_and_unvisited_keys(tmp_path):
    mask = np.zeros((600, 600), bool)
    mask[:, :150] = True
    mask &= np.tri(600, dtype=bool)
    pixels = imread(mask_picture(mask, title="t", path=tmp_path / "m.png"))[..., :3]
    red, _, blue = 255 * np.moveaxis(pixels, -1, 0)
    grey = np.sum((abs(red - 224) < 2) & (abs(blue - 224) < 2))  # the future: half the square
    dark = np.sum((red < 20) & (blue > 90))  # the first 150 keys
    light = np.sum((abs(red - 247) < 2) & (blue > 253))
    assert dark / grey == pytest.approx(1 - 0.75**2, rel=0.05)
    assert light / grey == pytest.approx(0.75**2, rel=0.05)


def test_density_picture_darkens_with_density(tmp_path):
    density = np.zeros((8, 60), np.float32)
    paths = [tmp_path / "low.png", tmp_path / "high.png"]
    for value, path in zip((0.1, 0.9), paths, strict=True):
        density_picture(density + np.float32(value), title="t", path=path)
    low, high = (imread(path)[..., :3].mean() for path in paths)
    assert high < low - 0.1


def test_programs_are_one_for_a_shape_and_none_is_ready_while_another_compiles():
    programs, compiled = Programs(), []
    scale = jax.jit(lambda x, factor: {"scaled": x * factor}, static_argnames="factor")
    first = programs.add(scale.lower, jax.ShapeDtypeStruct((3,), jnp.float32), factor=2)
    assert first.outputs == {"scaled": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert programs.add(scale.lower, jnp.ones(3), factor=2) is first
    slow = SimpleNamespace(out_info=(), compile=lambda: time.sleep(0.3) or compiled.append(1))
    programs.add(lambda: slow)
    np.testing.assert_array_equal(programs.ready(first)(jnp.full(3, 5.0))["scaled"], 10)
    assert compiled
    for other in ((jnp.ones(4), 2), (jnp.ones(3), 3), (jnp.ones(3, jnp.int32), 2)):
        programs.add(scale.lower, other[0], factor=other[1])
    assert len(programs) == 5
