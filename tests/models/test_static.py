"""Static indices of a model: equal to the sparse attention on the prompt that they are from."""

import jax.numpy as jnp
import numpy as np
import pytest

import minference_jax as mj
from models.common.decoder import prefill
from models.common.passes import run_prefill
from models.common.static import static_attention
from tests.models.tiny import CONFIG, random_tokens, tiny_params

PATTERN = mj.VerticalSlash(vertical_size=8, slash_size=9, sink_size=2, window_size=2)


def sparse():
    patterns = mj.HeadPatterns.uniform(PATTERN, num_layers=3, num_heads=4)
    return mj.SparseAttention(patterns, 16, 16, dense_above=None)


def test_static_attention_is_the_sparse_one_on_its_prompt_and_lines_are_data():
    params, tokens = tiny_params(), random_tokens(1, 130)
    static = static_attention(params, tokens, config=CONFIG, sparse=sparse())
    assert static.lines.columns.shape == (3, 4, 32)
    assert static.lines.distances.shape == (3, 4, 16)
    read = lambda attention: prefill(params, tokens, config=CONFIG, attention_fn=attention)[0]
    got = read(static)
    np.testing.assert_array_equal(got, read(sparse()))

    programs = run_prefill._cache_size()
    other = random_tokens(1, 130, seed=1)
    other = static_attention(params, other, config=CONFIG, sparse=sparse())
    assert np.any(np.asarray(read(other)) != got)
    assert run_prefill._cache_size() == programs


@pytest.mark.usefixtures("as_users_see_it")
def test_misuse_is_explained():
    with pytest.raises(ValueError, match="one calibration prompt, got 2"):
        static_attention(tiny_params(), random_tokens(2, 9), config=CONFIG, sparse=sparse())
    static = mj.StaticAttention(sparse(), mj.StaticLines(*[jnp.zeros((3, 4, 8), jnp.int32)] * 2))
    with pytest.raises(ValueError, match="attention of one layer"):
        prefill(tiny_params(), random_tokens(1, 9), config=CONFIG, attention_fn=static.layer(0))
