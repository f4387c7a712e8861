"""The pattern search of one layer: costs, scores, choices, and planted patterns found again."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.patterns import Kind
from minference_jax.search import (
    TABLE_7,
    Calibration,
    Kernel,
    LayerScores,
    choose,
    executed_share,
    fit_budgets,
    for_heads,
    picked,
    score_candidates,
)
from minference_jax.search.search import _sums as score_sums
from tests.core.planted import BLOCK, HEAD_DIM, HEADS, KV_HEADS, LENGTH, PLANTED, planted_qkv
from tests.helpers import causal_mask, masked_attention

KERNEL = Kernel(block_q=BLOCK, block_kv=BLOCK)
TARGET = 0.3
LINES = [
    mj.VerticalSlash(vertical_size=columns, slash_size=distances, sink_size=1, window_size=1)
    for columns, distances in ((1, 4), (4, 1))
]
EMBED = 24
PROJECTION = np.random.default_rng(9).standard_normal((HEADS, HEAD_DIM, EMBED))
FAMILIES = [
    mj.AShape(sink_size=1, window_size=8),
    *LINES,
    mj.BlockSparse(num_blocks=8),
    mj.TriShape(sink_size=1, window_size=8, last_size=1),
    mj.Dense(),
]


def calibration(*seeds, lengths=(LENGTH, LENGTH)):
    """Two planted prompts; garbage pads them to one length, so that all tests share programs."""
    qkv = map(np.concatenate, zip(*map(planted_qkv, seeds), strict=True))
    gram = np.einsum("hde,hfe->hdf", PROJECTION, PROJECTION)
    weight = 1 / np.stack([(stream(seed) ** 2).sum(axis=1) for seed in seeds])
    residual = (jnp.asarray(x, jnp.float32) for x in (gram, weight))
    return Calibration(*map(jnp.asarray, qkv), jnp.array(lengths), *residual)


def stream(seed):
    """A residual stream whose rows differ much in length."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((LENGTH, EMBED)) * np.exp(rng.standard_normal((LENGTH, 1)))


@pytest.fixture(scope="module")
def searched():
    """The fitted candidates with their scores, and the prompts."""

    def one(*seeds):
        prompts = [calibration(*seeds)]
        fitted = fit_budgets(FAMILIES, prompts, target=TARGET, kernel=KERNEL)
        return score_candidates(fitted, prompts, kernel=KERNEL), prompts

    return [one(0, 1), one(2, 3)]


def test_planted_patterns_are_found(searched):
    for scores, _ in searched:
        best = choose(scores, "recall", at_most=TARGET)
        found = [type(p).__name__ for p in picked([scores], best[None]).grid()[0]]
        for (name, wanted), kind, at, recalls in zip(
            PLANTED.items(), found, best, scores.recall.T, strict=True
        ):
            assert kind == (wanted or kind), name
            assert (recalls[at] > 0.5) == (wanted is not None), name


SPARSE = np.array([not isinstance(family, mj.Dense) for family in FAMILIES])


def one_line_more(candidates):
    """Every budget a line, or a block, larger."""
    lined = (candidates.kind == Kind.A_SHAPE) | (candidates.kind == Kind.TRI_SHAPE)
    scaled = dict.fromkeys(("vertical_size", "slash_size", "last_size", "num_blocks"), True)
    scaled |= {"sink_size": lined, "window_size": lined}
    sizes = {name: getattr(candidates, name) for name in scaled}
    more = {
        name: jnp.where((size > 0) & scaled[name], size + 1, size) for name, size in sizes.items()
    }
    return dataclasses.replace(candidates, **more)


def test_budgets_cost_what_was_asked_and_a_line_more_would_not(searched):
    for scores, prompts in searched:
        assert np.all(scores.flops[SPARSE] <= TARGET)
        assert np.all(scores.flops[~SPARSE] == 1)
        cost = executed_share(one_line_more(scores.candidates), prompts, kernel=KERNEL)
        assert np.all(cost[SPARSE] > TARGET)


class Stream:
    """Prompts that are made when they are read, and how often they were."""

    def __init__(self, *prompts):
        self.prompts, self.read = prompts, 0

    def __iter__(self):
        self.read += 1
        yield from self.prompts


def test_fitting_reads_the_prompts_once():
    prompts = Stream(calibration(5, 6), calibration(7, 8))
    fitted = fit_budgets(FAMILIES, prompts, target=TARGET, kernel=KERNEL)
    assert prompts.read == 1
    # What counts is all of them together.
    assert np.all(executed_share(fitted, prompts, kernel=KERNEL)[SPARSE] <= TARGET)
    more = executed_share(one_line_more(fitted), prompts, kernel=KERNEL)
    assert np.all(more[SPARSE] > TARGET)


def counted_tiles(index, row, head, length):
    """Tiles that a head executes, one query tile after another."""
    columns = np.asarray(index.columns)[row, head, : int(index.column_count[row, head])]
    total = 0
    for tile, count in enumerate(np.asarray(index.count)[row, head]):
        if tile * BLOCK < length:
            total += int(count) + -(-int((columns < (tile + 1) * BLOCK).sum()) // BLOCK)
    return total


def row_by_row(q, k, v, mask, first_row, x):
    """Of one prompt: what each objective is a share of, for every head, as (part, whole)."""
    causal = causal_mask(len(q), len(q))
    out, dense = (
        masked_attention(q[None], k[None], v[None], visited[None])[0, first_row:]
        for visited in (mask, np.broadcast_to(causal, mask.shape))
    )
    keys = np.repeat(k, HEADS // KV_HEADS, axis=1).astype(np.float64)
    logits = np.einsum("qhd,khd->hqk", q.astype(np.float64), keys) / q.shape[2] ** 0.5
    weights = np.where(causal, np.exp(logits - logits.max(axis=2, keepdims=True)), 0)
    weights /= weights.sum(axis=2, keepdims=True)
    kept = np.where(mask, weights, 0).sum(axis=2)[:, first_row:]
    delta = out - dense
    moved = np.einsum("qhd,hde->qhe", delta, PROJECTION)
    moved = (moved**2).sum(axis=2) / (x[first_row:] ** 2).sum(axis=1)[:, None]
    return {
        "residual_error": (moved.sum(axis=0), len(moved)),
        "output_error": ((delta**2).sum(axis=(0, 2)), (dense**2).sum(axis=(0, 2))),
        "recall": (kept.sum(axis=1), kept.shape[1]),
        "log_recall": (np.log(kept).sum(axis=1), kept.shape[1]),
        "count": ((np.abs(delta) > 5e-3).sum(axis=(0, 2)), delta[:, 0].size),
        "density": (mask.sum(axis=(1, 2)), causal.sum()),
    }


def test_scores_are_those_of_masked_attention():
    lengths, first_row = (300, 260), 40
    prompt = calibration(0, 1, lengths=lengths)
    lines = mj.VerticalSlash(vertical_size=20, slash_size=30, sink_size=4, window_size=8)
    others = [mj.AShape(sink_size=9, window_size=40), mj.BlockSparse(num_blocks=1), mj.Dense()]
    # As many candidates and capacities as the other tests have: no new program.
    grid = [[lines] * HEADS, [*others, lines] * 2, *[[mj.Dense()] * HEADS] * 4]
    candidates = mj.HeadPatterns.from_grid(grid, max_columns=384, max_blocks=6)
    scores = score_candidates(candidates, [prompt], first_row=first_row, kernel=KERNEL)

    run = jax.jit(lambda attention, q, k, v, lengths: attention.attend(q, k, v, lengths=lengths)[1])
    for number in range(2):
        index = run(KERNEL.attention(candidates).layer(number), *prompt[:4])
        masks = np.asarray(index.to_mask(LENGTH, LENGTH))
        sums, tiles = [], []
        for row, length in enumerate(lengths):
            qkv = (np.asarray(x)[row, :length] for x in prompt[:3])
            mask, x = masks[row, :, :length, :length], stream(row)[:length]
            sums.append(row_by_row(*qkv, mask, first_row, x))
            tiles.append([counted_tiles(index, row, head, length) for head in range(HEADS)])
        for name in sums[0]:
            part, whole = (sum(x) for x in zip(*(own[name] for own in sums), strict=True))
            tolerance = 1e-4 if name == "count" else 1e-5  # an element may lie on the threshold
            np.testing.assert_allclose(
                getattr(scores, name)[number], part / whole, atol=tolerance, rtol=1e-4, err_msg=name
            )
        dense = sum(i + 1 for length in lengths for i in range(-(-length // BLOCK)))
        np.testing.assert_allclose(scores.flops[number], np.sum(tiles, axis=0) / dense)


def test_prompts_one_after_another_count_as_together(searched):
    candidates = searched[0][0].candidates
    one, other = calibration(0, 0), calibration(1, 1, lengths=(400, 400))
    both = calibration(0, 1, lengths=(LENGTH, 400))
    streamed = score_candidates(candidates, [one, other], kernel=KERNEL)
    together = score_candidates(candidates, [both], kernel=KERNEL)
    for name in ("flops", "density", "output_error", "residual_error", "recall", "count"):
        got, want = getattr(streamed, name), getattr(together, name)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=name)


def test_heads_of_a_group_share_budgets_and_patterns():
    prompts = [calibration(3, 4)]
    fitted = fit_budgets(FAMILIES, prompts, target=TARGET, group="kv_group", kernel=KERNEL)
    for size in (fitted.window_size, fitted.slash_size, fitted.num_blocks):
        grouped = np.asarray(size).reshape(len(FAMILIES), KV_HEADS, -1)
        assert np.all(grouped == grouped[:, :, :1])
    cost = executed_share(fitted, prompts, kernel=KERNEL).reshape(len(FAMILIES), KV_HEADS, -1)
    assert np.all(cost[:-1].mean(axis=2) <= TARGET)
    assert np.any(cost[:-1] > TARGET), "of a group, a head may cost more"


def synthetic(flops, recall, kv_heads=2):
    """Scores of candidates that only differ in these; [candidates, heads]."""
    values = {"flops": np.array(flops, float), "recall": np.array(recall, float)}
    others = ("output_error", "log_recall", "count")
    values |= {name: np.zeros_like(values["flops"]) for name in others}
    heads = values["flops"].shape[1]
    rows = [[mj.AShape(sink_size=0, window_size=1 + i)] * heads for i in range(len(flops))]
    return LayerScores(candidates=mj.HeadPatterns.from_grid(rows), kv_heads=kv_heads, **values)


def test_choice():
    flops = [[0.2, 0.2, 0.3, 0.5], [0.3, 0.1, 0.2, 0.5], [0.9, 0.9, 0.9, 0.4]]
    recall = [[0.5, 0.7, 0.6, 0.1], [0.8, 0.7, 0.6, 0.2], [0.9, 0.9, 0.9, 0.1]]
    scores = synthetic(flops, recall)
    # Best within the limit; of equals the cheaper; nothing within the limit: the cheapest.
    assert choose(scores, "recall", at_most=0.3).tolist() == [1, 1, 1, 2]
    assert choose(scores, "recall").tolist() == [2, 2, 2, 1]
    assert choose(scores, "recall", at_most=0.3, group="kv_group").tolist() == [1, 1, 1, 1]
    assert choose(scores, "count").tolist() == [0, 1, 1, 2]
    assert picked([scores], np.array([[1, 1, 0, 2]])).window_size.tolist() == [[2, 2, 1, 3]]


def test_scores_survive_a_file(searched, tmp_path):
    path = tmp_path / "layer.npz"
    searched[0][0].save(path)
    read = LayerScores.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["layer.npz"]
    assert read.candidates.grid() == searched[0][0].candidates.grid()
    assert jax.tree.structure(read.candidates) == jax.tree.structure(searched[0][0].candidates)
    for name in ("log_recall", "residual_error"):
        np.testing.assert_array_equal(getattr(read, name), getattr(searched[0][0], name))
    old = dict(np.load(path))
    del old["version"]
    np.savez(path, **old)
    with pytest.raises(ValueError, match="of version 1, expected 2; search again"):
        LayerScores.load(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="holds no scores"):
        LayerScores.load(path)


def test_no_array_grows_with_the_square_of_the_length():
    # Only traced: 128K tokens, one head.
    length, width = 131072, 8
    shapes = [jax.ShapeDtypeStruct((1, length, 1, width), jnp.bfloat16)] * 3
    patterns = mj.HeadPatterns.from_grid([[p] for p in TABLE_7])
    candidates = Kernel().attention(patterns)
    run = lambda *qkv: score_sums(
        candidates, Kernel().dense(), Calibration(*qkv), 0, measures=("flops",)
    )
    largest = max(_sizes(jax.make_jaxpr(run)(*shapes).jaxpr))
    assert length * width <= largest < 100 * length * width < length**2


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inner)


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    prompt = calibration(0, 1)
    with pytest.raises(ValueError, match="the residual error was not scored: give `Calibration`"):
        choose(synthetic([[0.2]], [[0.5]]), "residual_error")
    with pytest.raises(ValueError, match="the density was not counted: score with `density=True`"):
        choose(synthetic([[0.2]], [[0.5]]), "recall", at_most=0.3, measure="density")
    with pytest.raises(ValueError, match="both `projection_gram` and `row_weight`"):
        score_candidates(for_heads(FAMILIES, HEADS), [prompt._replace(row_weight=None)])
    with pytest.raises(ValueError, match="at least one pattern"):
        mj.search_patterns(*prompt[:3], candidates=[])
    with pytest.raises(ValueError, match="`target` must be above 0, got 0"):
        mj.search_patterns(*prompt[:3], target=0.0)
    with pytest.raises(TypeError, match="read several times"):
        fit_budgets(FAMILIES, iter([prompt]), target=0.3)
    with pytest.raises(ValueError, match="at least one calibration prompt"):
        fit_budgets(FAMILIES, [], target=0.3)
