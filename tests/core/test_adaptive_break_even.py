"""Prompts that are too short for an estimate: dense, and told so by shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.adaptive import break_even
from tests.core.adaptive import HEADS, KV_LEN, LAYOUT, LENGTHS, Q_LEN, REAL, prompts
from tests.helpers import assert_attention_close, causal_mask, masked_attention

HYBRID = mj.WithColumns(mj.BlockThreshold(0.9, 1, 1), 5)


def estimates(attention, q_len=None):
    """Whether a hybrid estimates for the prompts' last queries: only then it has columns."""
    q, k, v = prompts()
    _, index = jax.eval_shape(attention.attend, q[:, -q_len:] if q_len else q, k, v)
    return index.columns.shape[2] > 0


def hybrid(**given):
    return mj.AdaptiveAttention(HYBRID, LAYOUT, **given)


def test_a_short_prompt_is_dense():
    """77 queries of 141 keys have as many pairs as a whole prompt of 125.6 keys, 20 as of 72.4."""
    assert estimates(hybrid(break_even=125))
    assert not estimates(hybrid(break_even=126))
    assert estimates(hybrid(break_even=72), q_len=20)
    assert not estimates(hybrid(break_even=73), q_len=20)

    @jax.jit
    def attend(attention, q, k, v, lengths):
        out, index = attention.attend(q, k, v, lengths=lengths)
        return out, index.visited_pairs(Q_LEN, KV_LEN, lengths=lengths)

    inputs = (*map(jnp.asarray, prompts()), jnp.asarray(LENGTHS))
    got, (seen, causal) = attend(hybrid(break_even=126), *inputs)
    np.testing.assert_array_equal(seen, causal)
    want = masked_attention(
        *prompts(), np.broadcast_to(causal_mask(Q_LEN, KV_LEN), (2, HEADS, Q_LEN, KV_LEN))
    )
    for row, real in enumerate(REAL):
        assert_attention_close(got[row : row + 1, :real], want[row : row + 1, :real])


def test_a_break_even_is_that_of_the_device_unless_given(monkeypatch):
    monkeypatch.setattr(break_even, "not_hopper", lambda: "another device")
    assert estimates(hybrid())
    monkeypatch.setattr(break_even, "not_hopper", lambda: None)
    assert not estimates(hybrid())
    assert estimates(hybrid(break_even=0))
    assert estimates(hybrid(dense_above=None))


@pytest.mark.parametrize(
    ("heads", "head_dim"), [(9, 64), (14, 64), (12, 128)], ids=["smollm2", "0.5b", "1.5b"]
)
def test_what_was_measured_is_on_its_side_of_the_break_even(monkeypatch, heads, head_dim):
    """`experiments/results/h200/compare-*`: columns lose at 8,000 tokens, win at 32,000."""
    blocks, keys = mj.BlockThreshold(0.1), break_even.device_break_even
    monkeypatch.setattr(break_even, "not_hopper", lambda: "another device")
    assert keys(HYBRID, heads, head_dim) == 0
    monkeypatch.setattr(break_even, "not_hopper", lambda: None)
    assert 0 < keys(blocks, heads, head_dim) < 8000 < keys(HYBRID, heads, head_dim) < 32000
    assert keys(HYBRID, 2 * heads, head_dim) < keys(HYBRID, heads, head_dim)
    for other in (mj.XAttention(0.9), mj.WithColumns(mj.BlockDiagonals(8), 5)):
        assert keys(other, heads, head_dim) == 0


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_told_in_short_prompts_too():
    attention = mj.AdaptiveAttention(mj.BlockThreshold(jnp.ones(3)), LAYOUT, break_even=KV_LEN)
    with pytest.raises(ValueError, match="is for 3 lists, but there are 4"):
        jax.eval_shape(attention, *prompts())
