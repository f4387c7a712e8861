"""GLM-4: greedy tokens of the golden models, both naming styles, and the sizes of the presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import DenseAttention
from models.common.decoder import abstract_params
from models.common.generate import generate
from models.common.sampling import Sampling
from models.glm import config as presets
from tests.models.checkpoints import CASES
from tests.models.goldens import golden_model


@pytest.mark.parametrize("name", [case for case in CASES if "glm" in case])
def test_greedy_tokens_equal_transformers(name):
    config, params, case = golden_model(name)
    result = generate(
        params,
        jnp.asarray(case["tokens"]),
        config=config,
        attention_fn=DenseAttention(),
        max_new_tokens=case["greedy"].shape[1],
        sampling=Sampling(),
    )
    np.testing.assert_array_equal(result.tokens, case["greedy"])


def test_both_naming_styles_give_the_same_model():
    old_config, old, _ = golden_model("chatglm")
    new_config, new, _ = golden_model("glm")
    assert old_config == new_config
    jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(presets.glm4_9b_chat(), 9_399_951_360, id="glm-4-9b-chat"),
        # The published 9.48 B: two more key/value heads in each of 40 layers.
        pytest.param(presets.glm4_9b_chat_1m(), 9_483_857_920, id="glm-4-9b-chat-1m"),
    ],
)
def test_preset_has_published_number_of_parameters(config, parameters):
    tree = abstract_params(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_half_of_each_head_rotates_in_interleaved_pairs():
    rope = presets.glm4_9b_chat_1m().rope
    assert (rope.rotary_dim, rope.interleaved, rope.theta) == (64, True, 1e8)
