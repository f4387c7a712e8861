"""Which attention is recommended for a model, by its name and size."""

import jax
import numpy as np
import pytest

import minference_jax as mj
from minference_jax import recommended

CODER = (28, 12)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "qwen2.5-coder-1.5b-instruct-q4_k_m",
        "Qwen2.5 Coder 1.5B Instruct GGUF",
        "Qwen2.5 Coder 1.5B Instruct AWQ",
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M",
        "Qwen2.5-Coder-1.5B-Instruct-GPTQ-Int4",
        "Qwen2.5_Coder_1.5B_Instruct-BF16",
        "Qwen2.5-Coder-1.5B-Instruct-IQ3_XS.gguf",
    ],
)
def test_spellings_of_a_name_are_one_model(name):
    assert mj.recommended_patterns(*CODER, name) == "qwen2.5-coder-1.5b-thresholds"


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "Qwen/Qwen2.5-Coder-1.5B",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "Qwen/Qwen2.5-Math-1.5B-Instruct",
        "someone/Qwen2.5-Coder-1.5B-Instruct-SQL",
        "DeepSeek-R1-Distill-Qwen-1.5B",
    ],
)
def test_other_models_of_the_same_shape_are_not_taken_for_it(name):
    assert mj.recommended_patterns(*CODER, name) is None
    assert mj.recommended_patterns(CODER[0], 14, "Qwen2.5-Coder-1.5B-Instruct") is None


def test_a_known_model_gets_what_is_shipped_and_others_the_hybrid():
    def same(made, wanted):
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, made, wanted)

    for name, shipped in recommended._SEARCHED.items():
        wanted = mj.load_shipped(shipped)
        layers, heads = wanted.estimator.blocks.alpha.shape
        same(mj.recommended_attention(layers, heads, name), wanted)
        hybrid = mj.AdaptiveAttention(mj.WithColumns(mj.BlockThreshold(0.1), 512))
        same(mj.recommended_attention(layers), hybrid.for_layers(layers))
