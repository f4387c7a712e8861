"""Which attention the options ask for, and that what an adaptive one visited can be drawn."""

import dataclasses
import functools
import io
import types

import jax
import numpy as np
import pytest
from rich.console import Console

import minference_jax as mj
from experiments.common.attention import AttentionOptions
from experiments.common.options import ModelOptions
from experiments.common.session import load, run_prefill, visited_mask
from experiments.latency.command import Latency
from experiments.latency.layer import index_shapes
from minference_jax.recommended import RECOMMENDED

SIZE = {"num_layers": 2, "num_heads": 4}


def test_minference_alone_is_the_recommended_adaptive_attention():
    options = AttentionOptions()
    built = options.build(**SIZE)
    assert isinstance(built, mj.AdaptiveAttention)
    leaves = zip(jax.tree.leaves(built), jax.tree.leaves(RECOMMENDED), strict=True)
    for leaf, number in leaves:
        np.testing.assert_array_equal(leaf, np.full((2, 1), number, leaf.dtype))
    assert f"alpha={RECOMMENDED.blocks.alpha}" in options.describe()
    assert f"num_columns={RECOMMENDED.num_columns}" in options.describe()


@pytest.mark.usefixtures("as_users_see_it")  # a model here is its name and size
def test_minference_alone_is_what_was_searched_for_a_model():
    for options, name, want in (
        (AttentionOptions(), "Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b-thresholds"),
        (AttentionOptions(), "Qwen/Qwen2.5-0.5B-Instruct", None),
        (AttentionOptions(attention="dense"), "Qwen/Qwen2.5-Coder-0.5B-Instruct", None),
    ):
        config = types.SimpleNamespace(num_layers=24, num_heads=14)
        said = io.StringIO()
        model = types.SimpleNamespace(config=config, name=name)
        chosen = options.for_model(model, Console(file=said, width=20))
        assert chosen == dataclasses.replace(options, patterns=want)
        if options.attention == "dense":
            assert not said.getvalue()
        else:
            assert name in said.getvalue()
            assert "--patterns" in said.getvalue()
        if want:
            assert chosen.describe() == f"minference, patterns of {want}"
            assert want in said.getvalue()


def test_minference_with_a_budget_of_lines_is_vertical_slash():
    options = AttentionOptions(slash_size=200)
    pattern = mj.VerticalSlash(vertical_size=1000, slash_size=200)
    assert options.build(**SIZE).patterns.grid() == [[pattern] * 4] * 2
    assert "vertical_slash for every head" in options.describe()
    assert "slash_size=200" in options.describe()


def test_shipped_patterns_are_named_and_files_still_reached(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for path, size in ((shipped / "tiny-1.5b.json", 64), (tmp_path / "tiny-1.5b", 32)):
        pattern = mj.AShape(sink_size=8, window_size=size)
        mj.HeadPatterns.uniform(pattern, **SIZE).save(path)
    for name in ("shipped_patterns", "load_shipped"):
        monkeypatch.setattr(mj, name, functools.partial(getattr(mj, name), folder=shipped))
    monkeypatch.chdir(tmp_path)
    for asked, size in (("tiny-1.5b", 64), ("./tiny-1.5b", 32)):
        options = AttentionOptions(patterns=asked)
        options.check_readable()
        built = options.build(**SIZE)
        assert isinstance(built, mj.SparseAttention)
        assert built.patterns.pattern(1, 3) == mj.AShape(sink_size=8, window_size=size)
        assert options.describe() == "minference, patterns of tiny-1.5b"


def test_latency_times_the_recommended_layer_too():
    case = Latency()._own_layer(4, None)
    assert isinstance(case.attention, mj.AdaptiveAttention)
    shape = lambda heads: jax.ShapeDtypeStruct((1, 3000, heads, 16), np.float32)
    index = index_shapes(case, shape(4), shape(2), shape(2))
    assert index.columns.shape == (1, 4, RECOMMENDED.max_columns)


def test_what_an_adaptive_attention_visited_is_counted_and_drawn(tiny_model):
    quiet = Console(file=io.StringIO())
    model = load(ModelOptions(model=tiny_model, rope_scaling="linear:8"), quiet)
    length = 250
    tokens = (3 + np.arange(length) ** 2 % 50).astype(np.int32)[None, :]
    blocks = mj.BlockThreshold(alpha=0.9, local_blocks=1)
    layout = mj.Layout(block_q=32, block_kv=16)
    attention = mj.AdaptiveAttention(mj.WithColumns(blocks, 5), layout, break_even=0)
    run = run_prefill(
        model, tokens, attention.for_layers(2), name="adaptive", console=quiet, chunk_size=120,
        keep_index=True,
    )  # fmt: skip
    causal = np.tri(length, dtype=bool)
    for layer, head in ((0, 1), (1, 3)):
        mask = visited_mask(run, layer=layer, head=head, length=length)
        assert not np.any(mask & ~causal)
        share = mask.sum() / causal.sum()
        assert share < 0.8
        assert run.density[layer, head] == pytest.approx(share)
