"""Going through a model layer by layer is the same as reading the prompt at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.common.capture import (
    capture_qkv,
    embed_prompt,
    layer_output,
    layer_qkv,
    output_gram,
)
from models.common.decoder import prefill
from tests.models.tiny import CONFIG, ScaledQueries, random_tokens, tiny_params


def test_layers_one_by_one_equal_the_whole_pass():
    params, tokens = tiny_params(), random_tokens(2, 15)
    lengths = jnp.array([15, 9], jnp.int32)
    attention = ScaledQueries(jnp.array([0.5, -1.0, 2.0]))
    _, _, want = prefill(
        params, tokens, config=CONFIG, attention_fn=attention, lengths=lengths, observe=capture_qkv
    )
    x = embed_prompt(params, tokens, config=CONFIG, lengths=lengths)
    for layer in range(CONFIG.num_layers):
        got = layer_qkv(params, layer, x, config=CONFIG, lengths=lengths)
        for name in ("q", "k", "v"):
            for row, length in enumerate(lengths.tolist()):
                np.testing.assert_allclose(
                    getattr(got, name)[row, :length],
                    getattr(want, name)[layer, row, :length],
                    atol=2e-5,
                )
        own = ScaledQueries(attention.scale[layer])
        x = layer_output(params, layer, x, own, config=CONFIG, lengths=lengths)


@pytest.mark.usefixtures("as_users_see_it")
def test_prompts_beyond_the_context_are_refused():
    tokens = random_tokens(1, CONFIG.max_position + 1)
    lengths = jnp.array([CONFIG.max_position + 1], jnp.int32)
    with pytest.raises(ValueError, match="do not fit the model's context of 256"):
        embed_prompt(tiny_params(), tokens, config=CONFIG, lengths=lengths)


def test_gram_measures_what_a_head_adds_to_the_stream():
    params, rng = tiny_params(), np.random.default_rng(0)
    kernel = np.asarray(params["layers"]["attention"]["o_proj"]["kernel"], np.float64)
    for layer in range(CONFIG.num_layers):
        gram = np.asarray(output_gram(params, layer))
        for head, own in enumerate(gram):
            change = rng.standard_normal(CONFIG.head_dim)
            want = np.sum((change @ kernel[layer, head]) ** 2)
            np.testing.assert_allclose(change @ own @ change, want, rtol=1e-5)
