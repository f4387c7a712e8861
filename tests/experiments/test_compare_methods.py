"""`minference compare`: methods as the command line names them."""

import numpy as np
import pytest

import minference_jax as mj
from experiments.compare.methods import parse_method, parse_methods


def attention_of(spec):
    return parse_method(spec).attention(2, 4)


@pytest.mark.parametrize(
    ("spec", "label", "kind"),
    [
        ("a_shape:128,1024", "a_shape:128,1024", mj.SparseAttention),
        ("tri_shape:8,64,32", "tri_shape:8,64,32", mj.SparseAttention),
        ("vertical_slash:1000,6096", "vertical_slash:1000,6096", mj.SparseAttention),
        ("block_sparse:100", "block_sparse:100", mj.SparseAttention),
        ("triangle_mix:1,8,64,32", "triangle_mix:1,8,64,32", mj.SparseAttention),
        ("threshold:.10", "threshold:0.1", mj.AdaptiveAttention),
        ("threshold:0.1,08", "threshold:0.1,8", mj.AdaptiveAttention),
        ("hybrid:0.1,1000", "hybrid:0.1,1000", mj.AdaptiveAttention),
        ("hybrid:0.1,1000,16", "hybrid:0.1,1000,16", mj.AdaptiveAttention),
        ("xattention:1", "xattention:1", mj.AdaptiveAttention),
        ("flexprefill:0.95,0.1", "flexprefill:0.95,0.1", mj.AdaptiveAttention),
        ("diagonals:32,512", "diagonals:32,512", mj.AdaptiveAttention),
        ("block_mass:0.01", "block_mass:0.01", mj.AdaptiveAttention),
        ("block_mass:0.01,512,32", "block_mass:0.01,512,32", mj.AdaptiveAttention),
        ("dense:xla", "dense:xla", mj.DenseAttention),
        ("diagonals:32", "diagonals:32", mj.AdaptiveAttention),
    ],
)
def test_methods(spec, label, kind):
    method = parse_method(spec)
    assert (method.label, method.family) == (label, label.split(":")[0])
    assert isinstance(method.attention(2, 4), kind)


def test_sizes_reach_the_patterns():
    patterns = attention_of("triangle_mix:1,8,64,32").patterns
    triangle = mj.TriShape(sink_size=8, window_size=64, last_size=32)
    assert patterns.grid() == [[mj.Dense()] * 4, [triangle] * 4]
    estimator = attention_of("hybrid:0.25,70,16").estimator
    assert estimator.blocks.pooled_rows == 16
    assert (estimator.blocks.alpha.tolist(), estimator.num_columns.tolist()) == (
        [[0.25], [0.25]],
        [[70], [70]],
    )


def test_shuffled_patterns_are_the_same_at_other_heads(tmp_path):
    grid = [[mj.AShape(sink_size=8 * layer + head, window_size=9) for head in range(8)]
            for layer in range(4)]  # fmt: skip
    path = tmp_path / "a,b.json"
    mj.HeadPatterns.from_grid(grid).save(path)
    found = {}
    for words, label in (("", "0"), (",0", "0"), (",1", "1")):
        method = parse_method(f"shuffled:{path}{words}")
        assert (method.family, method.label) == ("shuffled", f"shuffled:a,b.json,{label}")
        sizes = method.attention(4, 8).patterns.sink_size
        assert sorted(sizes.reshape(-1).tolist()) == list(range(32))
        found[words] = sizes.tolist()
    assert found[""] == found[",0"] != found[",1"]
    moved = np.asarray(found[""]) // 8 != np.arange(4)[:, None]
    assert moved.any()  # heads change layers, too


def test_dense_comes_first_and_once():
    methods = parse_methods(("hybrid:0.1,100", "dense"))
    assert [method.label for method in methods] == ["dense", "hybrid:0.1,100"]
