"""The adaptive attention: its output, its fallback, its parameters as data, its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.adaptive import lists
from pallas_kernels.block_sparse_attention.index import validate
from tests.core import brute_force_adaptive as brute_force
from tests.core.adaptive import ELEMENTS, HEADS, KV_LEN, LAYOUT, LENGTHS, Q_LEN, REAL, prompts
from tests.helpers import assert_attention_close, causal_mask, masked_attention


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(lists, "ELEMENTS", ELEMENTS)


def hybrid(alpha=0.5, num_columns=20):
    """One layer or several, with a parameter for each head, so that all share a program."""
    alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (np.size(alpha) // HEADS or 1, HEADS))
    columns = jnp.full_like(alpha, num_columns, jnp.int32)
    return mj.WithColumns(
        mj.BlockThreshold(alpha, 1, 2, pooled_rows=1, parts=1), columns, max_columns=32
    )


def attention(estimator, *, dense_above=None, shared=False):
    layout = dataclasses.replace(LAYOUT, shared=shared)
    return mj.AdaptiveAttention(estimator, layout, dense_above=dense_above)


OFFSET = jnp.int32(KV_LEN - Q_LEN)


@jax.jit
def attend(attention, q, k, v, lengths, q_offset):
    at = {"lengths": lengths, "q_offset": q_offset}
    out, index = attention.attend(q, k, v, **at)
    return out, index, index.to_mask(Q_LEN, KV_LEN, **at)


@pytest.mark.parametrize(
    ("offset", "lengths"),
    [
        pytest.param(KV_LEN - Q_LEN, LENGTHS, id="whole"),
        # As chunked prefill: the cache holds more than was read, one prompt ends inside the chunk.
        pytest.param(37, np.array([37 + Q_LEN, 90]), id="chunk"),
    ],
)
def test_hybrid_is_blocks_and_columns_and_output_is_attention_over_them(offset, lengths):
    q, k, v = prompts()
    unread = np.arange(KV_LEN)[None, :, None, None] >= lengths[:, None, None, None]
    k, v = np.where(unread, np.float32(30), k), np.where(unread, np.float32(30), v)
    arrays = map(jnp.asarray, (q, k, v, lengths, np.int32(offset)))
    out, index, mask = attend(attention(hybrid()).for_layers(1).layer(0), *arrays)
    validate(index)
    for b, h in np.ndindex(2, HEADS):
        prompt = brute_force.Prompt([q[b, :, h]], k[b, :, h // 2], offset, int(lengths[b]), 32, 16)
        parameters = {
            "alpha": 0.5,
            "sink_blocks": 1,
            "local_blocks": 2,
            "pooled_rows": 1,
            "parts": 1,
        }
        want = prompt.mask(functools.partial(brute_force.block_threshold, prompt, **parameters))
        want[:, sorted(brute_force.columns(prompt, 20))] = True
        want &= causal_mask(Q_LEN, KV_LEN, offset)
        real = int(lengths[b]) - offset
        np.testing.assert_array_equal(mask[b, h, :real], want[:real])
    want = masked_attention(q, k, v, np.asarray(mask))
    for b, length in enumerate(lengths - offset):
        assert_attention_close(out[b : b + 1, :length], want[b : b + 1, :length])


def test_real_rows_do_not_depend_on_padding_or_other_rows():
    q, k, v = map(jnp.asarray, prompts())
    made = attention(hybrid()).for_layers(1).layer(0)
    together = attend(made, q, k, v, jnp.asarray(LENGTHS), OFFSET)[0]
    real = int(REAL[1])
    noise = [
        jnp.where(jnp.arange(x.shape[1])[None, :, None, None] < n, x, -3.0)
        for x, n in ((q, real), (k, int(LENGTHS[1])), (v, int(LENGTHS[1])))
    ]
    again = attend(made, *(x.at[0].set(x[1]) for x in noise), jnp.asarray(LENGTHS[[1, 1]]), OFFSET)
    np.testing.assert_array_equal(again[0][0, :real], together[1, :real])


def costly(index, dense_above):
    """Which query tiles execute more than this many times what dense attention does, and that."""
    # The first row is at 64, so query tiles begin where key tiles do.
    end = KV_LEN - Q_LEN + 32 * np.arange(1, 4)
    used = np.arange(index.columns.shape[2]) < index.column_count[..., None]
    seen = used[:, :, None] & (index.columns[:, :, None] < end[:, None])
    executed = index.count + -(-seen.sum(axis=3) // 16)
    return executed > dense_above * (end // 16), end // 16


def test_parameters_are_data_and_costly_query_tiles_dense():
    arrays = (*map(jnp.asarray, prompts()), jnp.asarray(LENGTHS), OFFSET)
    attend(attention(hybrid()).for_layers(1).layer(0), *arrays)
    programs = attend._cache_size()
    alphas = np.repeat([0.1, 0.5, 0.9], HEADS).reshape(3, HEADS)
    layers = attention(hybrid(alphas)).for_layers(3)
    plain = [jax.device_get(attend(layers.layer(i), *arrays)[1:]) for i in range(3)]
    assert attend._cache_size() == programs
    assert len({index.count.tobytes() for index, _ in plain}) == 3

    @jax.jit
    def scan(made, q, k, lengths):
        def layer(_, made):
            index = made.estimate(q, k, lengths=lengths)
            return None, (index, index.to_mask(Q_LEN, KV_LEN, lengths=lengths))

        return jax.lax.scan(layer, None, made)[1]

    made = attention(hybrid(alphas), dense_above=0.9).for_layers(3)
    found, masks = scan(made, arrays[0], arrays[1], arrays[3])
    fell_back = []
    for (index, mask), count, got in zip(plain, np.asarray(found.count), masks, strict=True):
        above, dense = costly(index, 0.9)
        np.testing.assert_array_equal(count, np.where(above, dense, index.count))
        rows = np.repeat(above, 32, axis=2)[:, :, :Q_LEN]
        want = np.where(rows[..., None], causal_mask(Q_LEN, KV_LEN), mask)
        for b, length in enumerate(REAL):
            np.testing.assert_array_equal(got[b, :, :length], want[b, :, :length])
        fell_back.append(above)
    assert 0 < np.sum(fell_back) < np.size(fell_back)
    alphas[0] = [0.1, 0.5, 0.9, 0.1]
    mixed = attention(hybrid(alphas), dense_above=0.9).for_layers(3)
    count = np.asarray(scan(mixed, arrays[0], arrays[1], arrays[3])[0].count)[0]
    of_head = np.stack([found.count[at][:, h] for h, at in enumerate((0, 1, 2, 0))], axis=1)
    np.testing.assert_array_equal(count, of_head)


def test_an_index_from_outside_is_visited_as_it_is():
    q, k, v = map(jnp.asarray, prompts())
    lengths = jnp.asarray(LENGTHS)
    _, index, mask = attend(attention(hybrid()).for_layers(1).layer(0), q, k, v, lengths, OFFSET)
    layers = mj.IndexedAttention(jax.tree.map(lambda x: jnp.stack([0 * x, x]), index), "reference")
    visit = jax.jit(lambda made, q, k, v, lengths: made.attend(q, k, v, lengths=lengths))
    out, used = visit(layers.layer(1), q, k, v, lengths)
    np.testing.assert_array_equal(used.entries, index.entries)
    want = masked_attention(*prompts(), np.asarray(mask))
    for b, length in enumerate(REAL):
        assert_attention_close(out[b : b + 1, :length], want[b : b + 1, :length])


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    call = lambda made: jax.eval_shape(made, *prompts())
    plain = mj.BlockThreshold(0.1)
    with pytest.raises(ValueError, match=r"`alpha` must be within 0\.0\.\.1\.0, got 1\.5"):
        mj.BlockThreshold(1.5)
    with pytest.raises(ValueError, match=r"layer\(i\)"):
        call(attention(plain).for_layers(2))
    with pytest.raises(ValueError, match="is for 3 lists, but there are 4"):
        call(attention(mj.BlockThreshold(jnp.ones(3))))
    with pytest.raises(ValueError, match="is for 4 lists, but there are 2"):
        call(attention(mj.BlockThreshold(jnp.ones(4)), shared=True))
    with pytest.raises(ValueError, match=r"one layer.*`for_layers`"):
        attention(plain).layer(0)
    with pytest.raises(ValueError, match="layer 2 of an attention with 2 layers"):
        attention(plain).for_layers(2).layer(2)
    with pytest.raises(ValueError, match="for 2 layers, not for 3"):
        attention(plain).for_layers(2).for_layers(3)
    with pytest.raises(ValueError, match=r"`pooled_rows` \(5\) must divide"):
        call(attention(mj.BlockThreshold(0.1, pooled_rows=5)))
    with pytest.raises(ValueError, match=r"`parts` \(3\) must divide `block_kv`"):
        call(attention(mj.BlockThreshold(0.1, parts=3)))
    with pytest.raises(ValueError, match=r"`stride` \(64\) must divide"):
        call(attention(mj.XAttention(0.1, stride=64)))
    with pytest.raises(ValueError, match="`max_columns` must be given"):
        mj.WithColumns(mj.BlockThreshold(0.1), jnp.array([3]))
    with pytest.raises(ValueError, match=r"within 0\.\.32, got 33"):
        mj.WithColumns(plain, 33, max_columns=32)
    with pytest.raises(ValueError, match="chooses columns itself"):
        call(attention(mj.WithColumns(mj.WithColumns(plain, 3), 3)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mj.Layout(max_blocks=0)
