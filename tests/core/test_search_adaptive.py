"""The pattern search over adaptive thresholds, and the file of what it finds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.files import attention_size
from minference_jax.search import LayerScores, choose_globally, picked, score_candidates
from tests.core.planted import BLOCK, HEADS, LENGTH
from tests.core.test_search import KERNEL, calibration, stream
from tests.core.test_search import row_by_row as scores_by_numpy
from tests.helpers import causal_mask, masked_attention

ALPHAS = np.array([0.5, 0.05, 0.0], np.float32)
COLUMNS = 40


def hybrid(alpha, columns):
    blocks = mj.BlockThreshold(alpha, sink_blocks=1, local_blocks=1)
    layout = mj.Layout(block_q=BLOCK, block_kv=BLOCK)
    return mj.AdaptiveAttention(mj.WithColumns(blocks, columns, max_columns=64), layout=layout)


@jax.jit
def attend(attention, prompt):
    return attention.attend(*prompt[:3], lengths=prompt.lengths)


@pytest.fixture(scope="module")
def scored():
    """Thresholds that differ between heads as well as candidates, with their scores."""
    alpha = ALPHAS[:, None] * (1 - 0.05 * np.arange(HEADS))
    columns = jnp.array([[COLUMNS], [COLUMNS], [0]])
    candidates = hybrid(jnp.asarray(alpha, jnp.float32), columns)
    lengths = (300, 260)
    prompt = calibration(0, 1, lengths=lengths)
    return prompt, score_candidates(candidates, [prompt], kernel=KERNEL)


def test_scores_of_thresholds_are_those_of_masked_attention(scored):
    prompt, scores = scored
    _, index = attend(jax.tree.map(lambda x: x[1], scores.candidates), prompt)
    masks = np.asarray(index.to_mask(LENGTH, LENGTH))
    sums = []
    for row, length in enumerate(prompt.lengths.tolist()):
        qkv = (np.asarray(x)[row, :length] for x in prompt[:3])
        mask, x = masks[row, :, :length, :length], stream(row)[:length]
        sums.append(scores_by_numpy(*qkv, mask, 0, x))
    for name in ("residual_error", "output_error", "recall", "density"):
        part, whole = (sum(x) for x in zip(*(own[name] for own in sums), strict=True))
        np.testing.assert_allclose(
            getattr(scores, name)[1], part / whole, atol=1e-5, rtol=1e-4, err_msg=name
        )
    # A threshold of 0 without columns is dense, in cost as well.
    np.testing.assert_array_equal(scores.flops[2], 1.0)
    np.testing.assert_allclose(scores.residual_error[2], 0.0, atol=1e-9)


def test_dense_is_a_known_candidate_that_attends_densely(scored):
    prompt, scores = scored
    known = scores.take(np.array([0, 1])).with_dense()
    for name in ("flops", "density", "recall", "log_recall", "output_error", "residual_error"):
        got, want = getattr(known, name), getattr(scores, name)
        np.testing.assert_array_equal(got[:2], want[:2])
        np.testing.assert_allclose(got[2], want[2], atol=1e-6, err_msg=name)
    everywhere = picked([known], np.full((1, HEADS), 2)).layer(0)
    got, _ = attend(everywhere, prompt)
    causal = np.broadcast_to(causal_mask(260, 260), (2, HEADS, 260, 260))
    want = masked_attention(*(np.asarray(x)[:, :260] for x in prompt[:3]), causal)
    np.testing.assert_allclose(got[:, :260], want, atol=5e-5)
    estimator = dataclasses.replace(
        scores.candidates, estimator=mj.XAttention(jnp.full((3, 8), 0.9))
    )
    with pytest.raises(ValueError, match="with which XAttention keeps everything"):
        dataclasses.replace(scores, candidates=estimator).with_dense()


def test_one_budget_is_spent_on_thresholds_and_survives_files(scored, tmp_path):
    _, scores = scored
    scores.save(tmp_path / "layer.npz")
    read = LayerScores.load(tmp_path / "layer.npz")
    assert jax.tree.structure(read.candidates) == jax.tree.structure(scores.candidates)
    limit = scores.flops[:2].mean()
    layers = [read, scores]
    chosen = choose_globally(layers, "residual_error", at_most=limit)
    assert chosen.sum() > 0
    attention = picked(layers, chosen)
    want = np.asarray(scores.candidates.estimator.blocks.alpha)[chosen, np.arange(HEADS)]
    np.testing.assert_array_equal(attention.estimator.blocks.alpha, want)
    mj.save_attention(attention, tmp_path / "heads.json")
    loaded = mj.load_attention(tmp_path / "heads.json")
    assert attention_size(loaded) == (2, HEADS)
    assert loaded.layout == attention.layout
    for got, own in zip(jax.tree.leaves(loaded), jax.tree.leaves(attention), strict=True):
        np.testing.assert_array_equal(got, own)


def test_either_file_is_loaded_as_what_it_holds(tmp_path):
    patterns = mj.HeadPatterns.uniform(mj.BlockSparse(num_blocks=3), num_layers=2, num_heads=3)
    mj.save_attention(mj.SparseAttention(patterns), tmp_path / "patterns.json")
    loaded = mj.load_attention(tmp_path / "patterns.json")
    assert isinstance(loaded, mj.SparseAttention)
    assert loaded.patterns.grid() == patterns.grid()
    assert attention_size(loaded) == (2, 3)
    threshold = mj.AdaptiveAttention(mj.BlockThreshold(jnp.full((2, 3), 0.1)))
    mj.save_attention(threshold, tmp_path / "threshold.json")
    content = json.loads((tmp_path / "threshold.json").read_text())
    assert content["alpha"] == [[0.1] * 3] * 2
    assert content["sink_blocks"] == 1
    loaded = mj.load_attention(tmp_path / "threshold.json")
    assert isinstance(loaded.estimator, mj.BlockThreshold)
    np.testing.assert_array_equal(loaded.estimator.local_blocks, np.full((2, 3), 4))
    with pytest.raises(ValueError, match="holds thresholds, no patterns; `minference"):
        mj.HeadPatterns.load(tmp_path / "threshold.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of the adaptive format; expected 1"),
        ({"estimator": "x"}, "unknown estimator 'x'; expected threshold or hybrid"),
        ({"more": 1}, "expected the keys"),
        ({"alpha": [[0.1, 0.2], [0.3]]}, "layer 1: `alpha` has 1 heads, expected 2"),
        ({"alpha": [[0.1, 0.2], [0.3, 1.5]]}, "layer 1, head 1: `alpha` must be a number within 0"),
        ({"alpha": [[0.1, "a"]]}, "layer 0, head 1: `alpha` must be a number"),
        ({"alpha": 0.1}, "`alpha` must be a list of layers"),
        ({"num_columns": [[1, 2], [3, 0.5]]}, "layer 1, head 1: `num_columns` must be a whole"),
        ({"num_columns": [[1, 2]]}, "`num_columns` must be one number, or rows"),
        ({"layout": {"block": 1}}, "unexpected keyword argument 'block'"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_damaged_thresholds_are_told(tmp_path, change, words):
    path = tmp_path / "heads.json"
    attention = mj.AdaptiveAttention(mj.WithColumns(mj.BlockThreshold(jnp.full((2, 2), 0.1)), 8))
    mj.save_attention(attention, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words) as error:
        mj.load_attention(path)
    assert str(path) in str(error.value)


@pytest.mark.usefixtures("as_users_see_it")
def test_what_cannot_be_candidates_or_files_is_told(tmp_path):
    prompt = calibration(0, 1)
    one = hybrid(jnp.full(HEADS, 0.1), COLUMNS)
    with pytest.raises(ValueError, match=r"expected numbers, \[8\] for the heads, or \[candidates"):
        score_candidates(one, [prompt])
    with pytest.raises(ValueError, match=r"have the shapes .*\(2, 5\)"):
        score_candidates(hybrid(jnp.full((2, 5), 0.1), COLUMNS), [prompt])
    with pytest.raises(ValueError, match=r"`alpha` must be .layers, heads. to be written"):
        mj.save_attention(one, tmp_path / "one.json")
    with pytest.raises(ValueError, match=r"files hold BlockThreshold .* got XAttention"):
        mj.save_attention(mj.AdaptiveAttention(mj.XAttention(0.9)), tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
