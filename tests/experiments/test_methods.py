"""Methods as the command line names them, and what they keep for decoding."""

import io
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import minference_jax as mj
from experiments.common.errors import UserError
from experiments.common.methods import (
    for_model,
    parse_method,
    parse_methods,
    parse_whole_cache_methods,
)
from minference_jax.kv_cache import EightBitKV, PyramidKV, SnapKV, StreamingKV


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
        ("inf_llm:4096", "inf_llm:4096", mj.AdaptiveAttention),
        ("streaming_dilated:8,510", "streaming_dilated:8,510", mj.DilatedStreaming),
        ("streaming_strided:8,255,510", "streaming_strided:8,255,510", mj.DilatedStreaming),
        ("top_k:64", "top_k:64", mj.TopKAttention),
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


def test_sizes_reach_the_baselines():
    attention = attention_of("inf_llm:256,3,128")
    found = attention.estimator
    assert (found.n_local, found.topk, found.exc_block) == (256, 3, 128)
    assert attention.layout.shared
    assert [parse_method(spec).whole for spec in ("inf_llm:256", "dense")] == [True, False]
    assert attention_of("streaming_dilated:8,600") == mj.streaming_dilated(8, 600)
    assert attention_of("streaming_strided:8,300,600") == mj.streaming_strided(8, 300, 600)
    assert attention_of("top_k:64") == mj.TopKAttention(64)


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


def test_static_takes_lines_from_a_prompt_of_its_seed(tmp_path):
    path = tmp_path / "a,b.json"
    pattern = mj.VerticalSlash(vertical_size=8, slash_size=8)
    mj.HeadPatterns.uniform(pattern, num_layers=2, num_heads=4).save(path)
    found = [parse_method(f"static:{path}{words}") for words in ("", ",0", ",1", "+snapkv:64")]
    labels = [f"static:a,b.json,{words}" for words in ("0", "0", "1", "0+snapkv:64")]
    assert [method.label for method in found] == labels
    assert [method.calibrated for method in found] == [0, 0, 1, 0]
    assert found[3].compression(2) == SnapKV(budget=64)
    same = parse_method(f"patterns:{path}")
    assert (same.sha256, same.calibrated) == (found[0].sha256, None)


@pytest.mark.usefixtures("as_users_see_it")  # a model here is its name and size
def test_minference_is_what_is_recommended_for_the_model():
    config = types.SimpleNamespace(num_layers=30, num_heads=9)
    digests, said = set(), io.StringIO()
    for name, shipped in (("SmolLM2-135M-Instruct", "smollm2-135m-thresholds"), ("other", None)):
        asked = parse_methods(["minference+snapkv:64", "hybrid:0.1,512"])
        model = types.SimpleNamespace(config=config, name=name)
        method, named = for_model(asked, model, Console(file=said))
        recommended = mj.load_shipped(shipped) if shipped else mj.recommended_attention(30)
        got = method.attention(30, 9)
        assert jax.tree.structure(got) == jax.tree.structure(recommended)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, recommended)))
        assert (method.label, method.compression(30)) == ("minference+snapkv:64", SnapKV(budget=64))
        assert named == asked[1]
        assert (shipped or "no search is shipped for the model other") in said.getvalue()
        digests.add(method.sha256)
    assert len(digests - {None}) == 2


def test_budgets_that_are_named_run_at_any_length(tmp_path):
    thresholds, patterns = tmp_path / "thresholds.json", tmp_path / "patterns.json"
    mj.save_attention(mj.AdaptiveAttention(mj.BlockThreshold(np.full((2, 4), 0.1))), thresholds)
    lines = mj.VerticalSlash(vertical_size=8, slash_size=8)
    mj.HeadPatterns.uniform(lines, num_layers=2, num_heads=4).save(patterns)
    files = [
        f"{family}:{path}" for family in ("patterns", "shuffled") for path in (thresholds, patterns)
    ]
    budgets = [
        "threshold:0.1",
        "hybrid:0.1,64",
        "a_shape:4,8",
        "triangle_mix:1,4,8,2",
        "inf_llm:128",
    ]
    for spec in (*budgets, *files, f"static:{patterns}"):
        assert attention_of(spec).break_even == 0


@pytest.mark.parametrize(
    ("spec", "label", "slug", "kept"),
    [
        ("dense", "dense", "dense", None),
        ("dense+snapkv:0100", "dense+snapkv:100", "dense+snapkv-100", SnapKV(budget=100)),
        (
            "a_shape:1,2+streaming:4,60",
            "a_shape:1,2+streaming:4,60",
            "a_shape-1,2+streaming-4,60",
            StreamingKV(4, 60),
        ),
        ("dense+fp8", "dense+fp8", "dense+fp8", EightBitKV(dtype=jnp.float8_e4m3fn)),
        (
            "dense+int8:streaming:4,060",
            "dense+int8:streaming:4,60",
            "dense+int8-streaming-4,60",
            EightBitKV(StreamingKV(4, 60)),
        ),
        ("threshold:1e+0", "threshold:1", "threshold-1", None),
    ],
)
def test_a_suffix_says_what_is_kept(spec, label, slug, kept):
    method = parse_method(spec)
    assert (method.label, method.slug, method.compression(2)) == (label, slug, kept)
    bare = parse_method(re.split(r"\+[a-z]", spec)[0])
    assert jax.tree.structure(method.attention(2, 4)) == jax.tree.structure(bare.attention(2, 4))


def test_a_pyramid_is_for_the_layers_of_the_model():
    kept = parse_method("minference+pyramidkv:64").compression(3)
    assert isinstance(kept, PyramidKV)
    assert (kept.num_layers, kept.budget, kept.layer.tolist()) == (3, 64, [0, 1, 2])


def test_names_of_files_may_hold_anything(tmp_path):
    patterns = mj.HeadPatterns.uniform(mj.Dense(), num_layers=2, num_heads=4)
    slugs = set()
    for name in ("a+b.json", "a b", "a-b", "a%20b"):
        patterns.save(tmp_path / name)
        bare, kept = (parse_method(f"patterns:{tmp_path / name}{x}") for x in ("", "+snapkv:64"))
        assert (bare.label, bare.kept) == (f"patterns:{name}", None)
        assert kept.label == f"patterns:{name}+snapkv:64"
        slugs |= {bare.slug, kept.slug}
    assert len(slugs) == 8
    assert not any("/" in slug or " " in slug for slug in slugs)


def test_methods_of_one_name_are_told_apart(tmp_path):
    for number, pattern in enumerate((mj.Dense(), mj.BlockSparse(num_blocks=3))):
        (tmp_path / str(number)).mkdir()
        patterns = mj.HeadPatterns.uniform(pattern, num_layers=2, num_heads=4)
        patterns.save(tmp_path / str(number) / "a.json")
    specs = [f"patterns:{tmp_path}/{number}/a.json" for number in (0, 1)]
    with pytest.raises(UserError, match=r"patterns:a\.json twice; their files differ"):
        parse_methods(specs)
    with pytest.raises(UserError, match=r"threshold:0\.1 twice; remove one"):
        parse_methods(["threshold:0.10", "dense", "threshold:.1"])


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "at least one method"),
        (["spiral:3"], r"'spiral:3' is no method; known: dense\[:KERNEL\], minference, a_shape"),
        (["dense+snap:3"], "what follows .* must be snapkv:BUDGET, .* got snap:3"),
        (["dense+snapkv:3"], "--methods: .*what follows .* cannot be snapkv:3: .* a budget of 3"),
        (["spiral+snapkv:64"], "'spiral' is no method"),
        (["inf_llm:100"], "n_local must be a multiple of 128, got 100"),
        (["inf_llm:128,4,200"], "exc_block must be a multiple of 128, got 200"),
        (["inf_llm:0"], "n_local"),
        (["streaming_dilated:8,500"], "window_size must be at least 510, got 500"),
        (["streaming_strided:8,200,510"], "local_size must be at least 255, got 200"),
        (["top_k:0"], "`k` must be at least 1, got 0"),
        (["patterns:none.json+snapkv:64"], "pattern file; no pattern file at none.json"),
    ],
)
def test_what_is_no_method_is_told(specs, words):
    with pytest.raises(UserError, match=words):
        parse_methods(specs)


def test_a_command_that_keeps_everything_refuses_less():
    with pytest.raises(UserError, match=r"nothing is decoded; leave out \+snapkv:64 of dense"):
        parse_whole_cache_methods(["minference", "dense+snapkv:64"], why="nothing is decoded")
