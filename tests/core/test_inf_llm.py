"""InfLLM: what it visits against numpy and by hand, causality, sizes that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.adaptive import lists
from pallas_kernels.block_sparse_attention import mosaic_gpu
from pallas_kernels.block_sparse_attention.index import validate
from tests.core.brute_force_adaptive import Prompt
from tests.helpers import assert_attention_close, causal_mask, masked_attention, random_qkv

N, HEADS, KV_HEADS = 301, 4, 2
LENGTHS = np.array([301, 250])
LAYOUT = mj.Layout(block_q=32, block_kv=16)
SMALL = mj.InfLLM(n_local=32, topk=3, n_init=16, repr_topk=2, exc_block=64)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    # Some blocks at a time, and some chunks; the last steps are shorter.
    monkeypatch.setattr(lists, "ELEMENTS", 4 * 3 * 19 * 16)


def prompts():
    """Neighbours are alike, so that blocks differ; queries of a head have a mean."""
    q, k, v = random_qkv(5, batch=2, q_len=N, heads=HEADS, kv_heads=KV_HEADS)
    rng = np.random.default_rng(6)
    alike = lambda x: np.repeat(
        rng.standard_normal((2, N // 8 + 1, *x.shape[2:]), np.float32), 8, axis=1
    )[:, :N]
    mean = rng.standard_normal((1, 1, HEADS, 16), np.float32)
    return q + alike(q) + mean, k + 2 * alike(k), v


def attention(estimator=SMALL, layout=LAYOUT):
    return mj.AdaptiveAttention(estimator, layout, dense_above=None)


@jax.jit
def attend(made, q, k, v, lengths, q_offset=None):
    at = {"lengths": lengths, "q_offset": q_offset}
    out, index = made.attend(q, k, v, **at)
    return out, index, index.to_mask(q.shape[1], k.shape[1], **at)


def brute_force(prompt, first, sizes):
    """Blocks kept for the query tile at `first`, word by word from the docstring of InfLLM."""
    block, begin = prompt.block_kv, first // sizes.exc_block * sizes.exc_block
    chunk = range(begin, min(begin + sizes.exc_block, prompt.end))
    distant, kept = [], set()
    for number in range(prompt.num_blocks):
        keys = range(number * block, (number + 1) * block)
        if keys[0] >= sizes.n_init and keys[-1] + sizes.n_local < begin:
            distant.append((number, keys))
        else:
            kept.add(number)
    relevance = {}
    for number, keys in distant:
        score = {}
        for m in keys:
            following = prompt.queries(range(m + 1, m + sizes.n_local + 1))
            score[m] = np.mean(following, axis=0) @ prompt.k[m]
        best = sorted(keys, key=lambda m: -score[m])[: sizes.repr_topk]
        relevance[number] = sum(q @ prompt.k[m] for q in prompt.queries(chunk) for m in best)
    return kept | set(sorted(relevance, key=lambda number: -relevance[number])[: sizes.topk])


@pytest.mark.parametrize("shared", [False, True], ids=["each-head", "shared"])
def test_visits_what_the_definition_says(shared):
    q, k, v = prompts()
    made = attention(layout=dataclasses.replace(LAYOUT, shared=shared))
    out, index, mask = attend(made, *map(jnp.asarray, (q, k, v, LENGTHS)))
    validate(index)
    masks, dropped = set(), 0
    for b, h in np.ndindex(2, HEADS):
        group = HEADS // KV_HEADS
        together = range(h // group * group, (h // group + 1) * group) if shared else (h,)
        prompt = Prompt(
            [q[b, :, x] for x in together], k[b, :, h // group], 0, int(LENGTHS[b]), 32, 16
        )
        want = prompt.mask(lambda first, prompt=prompt: brute_force(prompt, first, SMALL))
        real = LENGTHS[b]
        np.testing.assert_array_equal(mask[b, h, :real], want[:real], err_msg=f"{b}, {h}")
        dropped += (causal_mask(N, N) & ~want)[:real].sum()
        masks.add(want.tobytes())
    assert dropped > 0.2 * causal_mask(N, N).sum() * 2 * HEADS
    # Of each head's own lists, those of a group differ, too.
    assert len(masks) > 2 * KV_HEADS - shared, "lists must differ to mean something"
    want = masked_attention(q, k, v, np.asarray(mask))
    for b, length in enumerate(LENGTHS):
        assert_attention_close(out[b : b + 1, :length], want[b : b + 1, :length])


def test_one_key_among_many_is_found_by_hand():
    # Block 5 of 8 keys holds one key that all queries look for; all other keys are worth less than
    # nothing, but block 3 is the least bad. The first block and the nearest two are always there.
    q, k = np.zeros((2, 80, 2), np.float32)
    q[:, 0], k[:, 0] = 1.0, -2.0
    k[24:32, 0], k[43, 0] = -1.0, 9.0
    sizes = mj.InfLLM(n_local=16, topk=1, n_init=8, repr_topk=1, exc_block=8)

    def tiles(sizes):
        made = attention(sizes, mj.Layout(block_q=8, block_kv=8))
        arrays = (jnp.asarray(x)[None, :, None] for x in (q, k, k))
        mask = attend(made, *arrays, jnp.array([80]))[2]
        return np.asarray(mask)[0, 0, 7::8, ::8].astype(int).tolist()

    assert tiles(sizes)[3:] == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],  # block 1 alone is distant
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],  # of equals the first
        [1, 1, 0, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 1, 1, 0, 0, 0],  # block 3 is distant and better
        [1, 0, 0, 1, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 1, 1, 1, 0],  # block 5 is distant and the best
        [1, 0, 0, 0, 0, 1, 0, 1, 1, 1],
    ]
    # With all keys as representatives the one drowns: 9 - 7 * 2 is still more than block 3's -8.
    assert tiles(dataclasses.replace(sizes, repr_topk=8))[9] == [1, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    k[43, 0] = 5.0
    assert tiles(dataclasses.replace(sizes, repr_topk=8))[9] == [1, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    assert tiles(dataclasses.replace(sizes, topk=7))[9] == [1] * 10


def test_a_chunk_depends_on_nothing_behind_it_and_rows_not_on_padding():
    q, k, v = prompts()
    arrays = map(jnp.asarray, (q, k, v, LENGTHS))
    out, _, mask = attend(attention(), *arrays)
    # Another end from row 192 on, where a chunk begins, in row 0; other padding in row 1.
    rows = np.arange(N)[None, :, None, None]
    changed = rows >= np.array([192, 250])[:, None, None, None]
    other = [np.where(changed, np.float32(-3) + x[:, ::-1], x) for x in (q, k, v)]
    again, _, other_mask = attend(attention(), *map(jnp.asarray, (*other, LENGTHS)))
    assert not np.array_equal(mask[0, :, 192:], other_mask[0, :, 192:])
    for b, stop in enumerate((192, 250)):
        np.testing.assert_array_equal(again[b, :stop], out[b, :stop])


def test_layers_and_prompts_that_it_cannot_read():
    q, k, v = (jnp.asarray(x[:1]) for x in prompts())
    layers = attention().for_layers(3)
    assert jax.tree.leaves(layers) == []
    assert layers.layer(2).estimator.topk == 3
    # With keys from before the queries, every key is visited.
    mask = attend(attention(), q, k, v, jnp.array([N]), jnp.int32(40))[2]
    np.testing.assert_array_equal(
        mask[:, :, : N - 40],
        np.broadcast_to(causal_mask(N - 40, N, 40), (1, HEADS, N - 40, N)),
    )


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    def call(layout=LAYOUT, q_len=N, **sizes):
        q, k, v = prompts()
        made = attention(dataclasses.replace(SMALL, **sizes), layout)
        return jax.eval_shape(made, q[:, :q_len], k, v)

    with pytest.raises(ValueError, match=r"whole prompts, got 64 queries for 301 keys.*chunk_size"):
        call(q_len=64)
    for name in ("n_init", "n_local", "exc_block"):
        with pytest.raises(ValueError, match=rf"`{name}` \(40\) must be a multiple of `block_kv`"):
            call(**{name: 40})
    with pytest.raises(ValueError, match=r"`exc_block` \(48\) must be a multiple of `block_q`"):
        call(exc_block=48)
    with pytest.raises(ValueError, match=r"`repr_topk` must be at most `block_kv` \(16\), got 17"):
        call(repr_topk=17)
    with pytest.raises(ValueError, match="`topk` must be within 1"):
        mj.InfLLM(topk=0)
    with pytest.raises(ValueError, match="`n_init` must be within 0"):
        mj.InfLLM(n_init=-128)


def test_lowers_for_cuda_with_short_lists():
    shape = lambda heads: jax.ShapeDtypeStruct((1, 2**15, heads, 64), jnp.bfloat16)
    scalars = (jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))

    def run(q, k, lengths, q_offset):
        at = {"lengths": lengths, "q_offset": q_offset}
        index = attention(mj.InfLLM(), mj.Layout(shared=True)).estimate(q, k, **at)
        # Beside the list of everything, 1 + 32 + 4 + 16 blocks of 128 for each query tile.
        assert index.entries.shape[2] < 256 * (53 + 2)
        return mosaic_gpu.block_sparse_attention(q, k, k, index, **at)

    traced = jax.jit(run).trace(shape(4), shape(2), *scalars)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


def test_scores_are_never_held_at_once(monkeypatch):
    # Keys are 34 MB. Scores of all chunks would be 67 MB, sums over the windows of all keys, too.
    monkeypatch.setattr(lists, "ELEMENTS", 2**20)
    shape = jax.ShapeDtypeStruct((1, 2**20, 1, 16), jnp.bfloat16)
    estimate = jax.jit(lambda q, k: attention(mj.InfLLM(), mj.Layout()).estimate(q, k))
    compiled = estimate.lower(shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 80e6
