"""The Llama family: greedy tokens of the golden models, and the sizes of the presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import DenseAttention
from models.common.decoder import abstract_params
from models.common.generate import generate
from models.common.sampling import Sampling
from models.llama import config as presets
from tests.models.checkpoints import CASES
from tests.models.goldens import golden_model

FACTORS = tuple(1.0 + 0.1 * i for i in range(48))


@pytest.mark.parametrize("name", [case for case in CASES if "glm" not in case])
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


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(presets.llama3_8b(), 8_030_261_248, id="llama3-8b"),
        pytest.param(presets.llama3_1_8b(), 8_030_261_248, id="llama3.1-8b"),
        pytest.param(presets.llama3_8b_gradient_262k(), 8_030_261_248, id="gradient-262k"),
        pytest.param(presets.llama3_8b_gradient_1048k(), 8_030_261_248, id="gradient-1048k"),
        pytest.param(presets.yi_9b_200k(), 8_829_407_232, id="yi-9b"),
        pytest.param(presets.mistral_7b(), 7_241_732_096, id="mistral-7b"),
        pytest.param(presets.smollm2_135m(), 134_515_008, id="smollm2-135m"),
        pytest.param(
            presets.phi3_mini_128k(short_factor=FACTORS, long_factor=FACTORS),
            3_821_079_552,
            id="phi3-mini",
        ),
        pytest.param(presets.qwen2_7b(), 7_615_616_512, id="qwen2-7b"),
        pytest.param(presets.qwen2_5("0.5B"), 494_032_768, id="qwen2.5-0.5b"),
        pytest.param(presets.qwen2_5("1.5B"), 1_543_714_304, id="qwen2.5-1.5b"),
        pytest.param(presets.qwen2_5("3B"), 3_085_938_688, id="qwen2.5-3b"),
        pytest.param(presets.qwen2_5("7B"), 7_615_616_512, id="qwen2.5-7b"),
        pytest.param(presets.qwen2_5("14B"), 14_770_033_664, id="qwen2.5-14b"),
        pytest.param(presets.qwen2_5("32B"), 32_763_876_352, id="qwen2.5-32b"),
        pytest.param(presets.qwen2_5("72B"), 72_706_203_648, id="qwen2.5-72b"),
    ],
)
def test_preset_has_published_number_of_parameters(config, parameters):
    tree = abstract_params(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("as_users_see_it")
def test_unknown_qwen_size_is_refused():
    with pytest.raises(ValueError, match="'8B'"):
        presets.qwen2_5("8B")
