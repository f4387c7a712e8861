"""Configurations: published ones are read, and nothing in one is overlooked."""

import dataclasses
import json

import numpy as np
import pytest

from models import LoadError
from models.common.config import DynamicNTKScaling, LinearScaling, Llama3Scaling, YarnScaling
from models.common.weights.decoder_attributes import IRRELEVANT
from models.common.weights.rope_scaling import scaling_from_mapping
from models.glm import config as glm_presets
from models.glm import convert as glm
from models.llama import config as llama_presets
from models.llama import convert as llama
from tests.models.checkpoints import CASES, GOLDEN, golden

FACTORS = {
    "short_factor": [1.0 + i / 50 for i in range(48)],
    "long_factor": [1.0 + i for i in range(48)],
}


def parse(values):
    family = glm if values["model_type"] in glm.HF_MODEL_TYPES else llama
    return family.config_from_hf(values)


LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA3_1 = {
    **LLAMA3,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
PHI3_128K = {
    "_name_or_path": "Phi-3-mini-128k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**FACTORS, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
GLM4_1M = {
    "_name_or_path": "THUDM/glm-4-9b-chat-1m",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "attn_implementation": "sdpa",
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True,
    "multi_query_group_num": 4,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_layers": 40,
    "rope_ratio": 10000,
    "original_rope": True,
    "padded_vocab_size": 151552,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 1048576,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
GLM4_HF = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "model_type": "glm",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": 151552,
}
GRADIENT = {**LLAMA3, "max_position_embeddings": 262144, "rope_theta": 283461213.0}


@pytest.mark.parametrize(
    ("values", "preset"),
    [
        pytest.param(LLAMA3, llama_presets.llama3_8b(), id="llama-3"),
        pytest.param(LLAMA3_1, llama_presets.llama3_1_8b(), id="llama-3.1"),
        pytest.param(GRADIENT, llama_presets.llama3_8b_gradient_262k(), id="llama-3-262k"),
        pytest.param(SMOLLM2, llama_presets.smollm2_135m(), id="smollm2"),
        pytest.param(QWEN2_5_7B, llama_presets.qwen2_5("7B"), id="qwen2.5"),
        pytest.param(
            PHI3_128K,
            llama_presets.phi3_mini_128k(
                **{name: tuple(factors) for name, factors in FACTORS.items()}
            ),
            id="phi-3-128k",
        ),
        pytest.param(GLM4_1M, glm_presets.glm4_9b_chat_1m(), id="glm-4-1m"),
        pytest.param(GLM4_HF, glm_presets.glm4_9b_chat(), id="glm-4-transformers"),
    ],
)
def test_published_configurations_equal_the_presets(values, preset):
    assert parse(values) == preset


# Without an effect in these configurations: no layer comes after the first with a window, and no
# scaling uses the length.
INERT = {
    "qwen2": {"max_window_layers", "sliding_window", "use_sliding_window"},
    "phi3": {"original_max_position_embeddings"},
    # Settings of precision, and repetitions of `padded_vocab_size` and `num_layers`.
    "chatglm": {
        "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32",
        "fp32_residual_connection",
        "num_hidden_layers",
        "vocab_size",
    },
}


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, 3.5]
    return 7 if value is None else {**value, "mystery": 7}


@pytest.mark.parametrize("name", CASES)
def test_every_attribute_counts_or_is_declared_irrelevant(name):
    values, _, _ = golden(name)
    config, kind = parse(values), values["model_type"]
    silent = set()
    for attribute, value in values.items():
        try:
            if parse({**values, "model_type": kind, attribute: changed(value)}) == config:
                silent.add(attribute)
        except (LoadError, KeyError):
            continue
    uses_length = "longrope" in name
    inert = INERT.get(kind, set()) - (
        {"original_max_position_embeddings"} if uses_length else set()
    )
    assert silent - IRRELEVANT <= inert


@pytest.mark.parametrize("name", [name for name in CASES if "rope_" in str(golden(name)[0])])
def test_every_rope_setting_counts(name):
    values, _, _ = golden(name)
    config = parse(values)
    for place in ("rope_scaling", "rope_parameters"):
        inner = values.get(place) or {}
        for key, value in inner.items():
            shadowed = key == "type" and "rope_type" in inner
            # Phi-3 states the original length outside, too, and there it wins.
            shadowed |= key == "original_max_position_embeddings" and key in values
            try:
                same = parse({**values, place: {**inner, key: changed(value)}}) == config
            except LoadError:
                continue
            assert shadowed or not same, key


def test_everything_unsupported_is_named_at_once():
    values = {
        **LLAMA3,
        "hidden_act": "gelu",
        "use_qk_norm": True,
        "sliding_window": 4096,
        "num_key_value_heads": 5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mystery": 1},
        "vocab_size": None,
    }
    with pytest.raises(LoadError) as raised:
        parse(values)
    for part in (
        "`hidden_act` = 'gelu', supported: 'silu'",
        "`use_qk_norm` = True is not known",
        "`sliding_window` = 4096 is shorter than the context of 8192",
        "32 query heads are not a multiple of 5",
        "`mystery` = 1 is not known",
        "`vocab_size` is missing",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        pytest.param(QWEN2_5_7B, {"use_sliding_window": True, "sliding_window": 4096,
                                  "max_window_layers": 20}, id="qwen2-window"),
        pytest.param(QWEN2_5_7B, {"layer_types": ["full_attention", "sliding_attention"]},
                     id="layer-types"),
        pytest.param(LLAMA3, {"partial_rotary_factor": 0.5}, id="llama-partial-rotary"),
        pytest.param(LLAMA3, {"rope_scaling": {"type": "mrope", "factor": 2.0}}, id="mrope"),
        pytest.param(LLAMA3, {"quantization_config": {"bits": 4}}, id="quantised"),
        pytest.param(PHI3_128K, {"rope_scaling": {**FACTORS, "long_factor": [1.0],
                                                  "type": "longrope"}}, id="short-factors"),
        pytest.param(PHI3_128K, {"sliding_window": 2047}, id="phi3-window"),
        pytest.param(GLM4_1M, {"post_layer_norm": False}, id="no-final-norm"),
        pytest.param(GLM4_1M, {"original_rope": False}, id="other-rope"),
        pytest.param(GLM4_1M, {"rmsnorm": False}, id="layer-norm"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused(base, changes):
    with pytest.raises(LoadError, match="asks for what this model does not do"):
        parse({**base, **changes})


def test_windows_that_hide_nothing_are_accepted():
    used = {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0}
    assert parse({**QWEN2_5_7B, **used}) == parse(QWEN2_5_7B)


def test_phi4_mini_rotates_a_part_of_each_head():
    values = {**PHI3_128K, "partial_rotary_factor": 0.75, "rope_scaling": None}
    assert parse(values).rope.rotary_dim == 72


def test_older_names_of_longrope_mean_the_same():
    for name in ("su", "yarn"):
        assert parse({**PHI3_128K, "rope_scaling": {**FACTORS, "type": name}}) == parse(PHI3_128K)


def test_chatglm_without_groups_has_as_many_heads():
    assert parse({**GLM4_1M, "multi_query_attention": False}).num_kv_heads == 32


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "default"}, None),
        ({"type": "linear", "factor": 2}, LinearScaling(factor=2.0)),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            DynamicNTKScaling(factor=2.0, original_max_position=4096),
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
            Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=1024
            ),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0},
            YarnScaling(
                factor=4.0,
                original_max_position=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=(0.2 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1),
                truncate=True,
            ),
        ),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else "",
)
def test_scalings_are_read(values, expected):
    scaling = scaling_from_mapping(values, max_position=4096)
    if isinstance(expected, YarnScaling):
        assert scaling.attention_factor == pytest.approx(expected.attention_factor)
        scaling = dataclasses.replace(scaling, attention_factor=expected.attention_factor)
    assert scaling == expected


def test_golden_cases_cover_both_ways_to_write_rope():
    configs = [json.loads(str(np.load(GOLDEN / f"{name}.npz")["config.json"])) for name in CASES]
    assert any("rope_parameters" in config for config in configs)
    assert any(config.get("rope_scaling") for config in configs)
