"""Writes the golden files of the model tests: tiny random Hugging Face models and their outputs.

Each `<case>.npz` holds

    config.json      the checkpoint's configuration, as a JSON string
    tensor:<name>    every tensor of the checkpoint under its Hugging Face name, fp32
    tokens           [batch, s] int32, the prompt
    logits           [batch, s, vocab] fp32, of a plain forward pass
    greedy           [batch, NEW_TOKENS] int32, greedy continuation

so that `config.json` and the tensors alone make a checkpoint directory. `rope/hf_frequencies.npz`
holds the inverse frequencies and attention factor that transformers computes for full-size
configurations. Weights are bf16 values stored as fp32, which halves the compressed files.
Configurations come in the two forms found in the wild: `rope_theta` with `rope_scaling` (most of
the hub), and `rope_parameters` (transformers 5).

    pip install torch transformers
    python tests/golden/make_hf_goldens.py
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUT = Path(__file__).parent
NEW_TOKENS = 6
# The greedy tokens of a case are only worth comparing when no step is a near tie.
MIN_MARGIN = 2e-3

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 72,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "use_sliding_window": False,
    "sliding_window": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
GLM = {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 100000000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
SHORT_96 = [1.0 + 0.01 * i for i in range(48)]
LONG_96 = [1.0 + 0.2 * i for i in range(48)]
SU = {
    "hidden_size": 96,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT_96, "long_factor": LONG_96},
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# name: (base configuration, changes, prompt length, configuration as transformers 5 saves it)
CASES = {
    "llama-mha": (LLAMA, {"num_key_value_heads": 4}, 24, False),
    "llama-gqa": (LLAMA, {}, 24, False),
    "llama-mqa": (LLAMA, {"num_key_value_heads": 1}, 24, True),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True, "num_hidden_layers": 3}, 24, False),
    "llama-bias": (LLAMA, {"attention_bias": True, "mlp_bias": True}, 24, True),
    "llama-linear": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, 24, False),
    "llama-dynamic": (
        LLAMA,
        {
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
        },
        40,
        False,
    ),
    "llama-llama3": (LLAMA, {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING}, 40, False),
    "llama-llama3-v5": (LLAMA, {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}, 40, True),
    "llama-yarn-untruncated": (
        LLAMA,
        {
            "rope_theta": 1000.0,
            "rope_scaling": {
                **YARN,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
                "truncate": False,
            },
        },
        40,
        True,
    ),
    "yi": (
        LLAMA,
        {"rope_theta": 5000000.0, "num_key_value_heads": 1, "pad_token_id": 0},
        24,
        False,
    ),
    "mistral": (MISTRAL, {}, 24, False),
    "qwen2": (QWEN2, {}, 24, False),
    "qwen2-untied": (QWEN2, {"tie_word_embeddings": False}, 24, True),
    "qwen2-yarn": (QWEN2, {"rope_scaling": {**YARN, "type": "yarn"}}, 40, False),
    "phi3": (PHI3, {}, 24, False),
    "phi3-longrope-short": (PHI3, SU, 20, False),
    "phi3-longrope-long": (PHI3, SU, 40, True),
    "glm": (GLM, {}, 24, False),
    "glm-v5": (GLM, {"attention_bias": False, "tie_word_embeddings": True}, 24, True),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is peaked and every bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.5 * noise
            elif "norm" in name:
                value = 1.0 + 0.3 * noise
            elif "embed" in name:
                value = noise
            else:
                value = noise * 1.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(value.to(torch.bfloat16).float())


def greedy_tokens(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Greedy continuation with one set of RoPE frequencies: those of the finished sequence.

    transformers lets dynamic frequencies move while tokens are generated, which leaves cached keys
    rotated by older ones. A pass at the final length first sets them, and they stay while sequences
    are longer than the original length; the other kinds do not change between the prompt and its
    continuation here.
    """
    length = tokens.shape[1]
    with torch.no_grad():
        model(torch.zeros((1, length + NEW_TOKENS), dtype=torch.long))
        sequence = tokens
        for _ in range(NEW_TOKENS):
            logits = model(sequence).logits[:, -1]
            best = logits.topk(2).values
            margin = float((best[:, 0] - best[:, 1]).min())
            if margin < MIN_MARGIN:
                raise ValueError(f"a near tie ({margin:.1e}) in the greedy tokens: change the seed")
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    return sequence[:, length:].numpy().astype(np.int32)


def saved_config(config: dict, hf_config, v5: bool) -> str:
    return json.dumps(hf_config.to_diff_dict() if v5 else config, indent=1, sort_keys=True)


def make_case(name: str) -> dict[str, np.ndarray]:
    base, changes, length, v5 = CASES[name]
    config = {**base, **changes}
    seed = zlib.crc32(name.encode())
    hf_config = AutoConfig.for_model(**json.loads(json.dumps(config)))
    model = AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(4, config["vocab_size"], (2, length), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
    greedy = greedy_tokens(model, tokens)
    tensors = model.state_dict()
    if config["tie_word_embeddings"]:  # a saved checkpoint does not repeat the shared tensor
        tensors.pop("lm_head.weight")
    return {
        "config.json": np.array(saved_config(config, hf_config, v5)),
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits,
        "greedy": greedy,
        **{f"tensor:{key}": value.numpy() for key, value in tensors.items()},
    }


def to_chatglm(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same GLM under the names and fused tensors of the original THUDM checkpoints."""
    config = json.loads(str(case["config.json"]))
    names = {key[7:]: value for key, value in case.items() if key.startswith("tensor:")}
    head_dim, rotary = config["head_dim"], int(config["head_dim"] * config["partial_rotary_factor"])
    theta = config["rope_theta"]
    out = {
        "embedding.word_embeddings.weight": names["model.embed_tokens.weight"],
        "encoder.final_layernorm.weight": names["model.norm.weight"],
        "output_layer.weight": names["lm_head.weight"],
        "rotary_pos_emb.inv_freq": (
            theta ** -(np.arange(0, rotary, 2, dtype=np.float32) / rotary)
        ).astype(np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            out[f"{new}.self_attention.query_key_value.{kind}"] = np.concatenate(
                [names[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        for there, here in (
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            out[f"{new}.{here}.weight"] = names[f"{old}.{there}.weight"]
    chatglm = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config["intermediate_size"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config["hidden_size"],
        "kv_channels": head_dim,
        "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_layers": config["num_hidden_layers"],
        "original_rope": True,
        "padded_vocab_size": config["vocab_size"],
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": theta / 10000.0,
        "seq_length": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": config["vocab_size"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    return {
        "config.json": np.array(json.dumps(chatglm, indent=1, sort_keys=True)),
        **{key: case[key] for key in ("tokens", "logits", "greedy")},
        **{f"tensor:transformer.{key}": value for key, value in out.items()},
    }


def rope_frequencies() -> dict[str, np.ndarray]:
    """Inverse frequencies `<name>` and `<name>:factor`; test_rope.py has the same cases."""
    divisors = {"short_factor": SHORT_96, "long_factor": LONG_96}
    cases = {
        "linear": ({"rope_type": "linear", "factor": 4.0}, 10000.0, 128, 4096, None),
        "dynamic-short": ({"rope_type": "dynamic", "factor": 2.0}, 10000.0, 128, 4096, 1000),
        "dynamic-long": ({"rope_type": "dynamic", "factor": 2.0}, 10000.0, 128, 4096, 100_000),
        "llama3": (
            {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}, 500000.0, 128, 131072,
            None
        ),
        "yarn": ({**YARN, "original_max_position_embeddings": 32768}, 1000000.0, 128, 131072, None),
        "yarn-untruncated": (
            {**YARN, "beta_fast": 20.0, "beta_slow": 2.5, "truncate": False}, 10000.0, 64, 128, None
        ),
        "longrope-short": ({"rope_type": "longrope", **divisors}, 10000.0, 96, 131072, 4096),
        "longrope-long": ({"rope_type": "longrope", **divisors}, 10000.0, 96, 131072, 4097),
    }  # fmt: skip
    out = {}
    for name, (scaling, theta, head_dim, context, length) in cases.items():
        if scaling["rope_type"] == "longrope":
            scaling = {
                **scaling,
                "original_max_position_embeddings": 4096,
                "factor": context / 4096,
            }
        config = LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=context,
            rope_parameters={**scaling, "rope_theta": theta},
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", length)
        out[name] = frequencies.numpy()
        out[f"{name}:factor"] = np.float64(factor)
    return out


def main() -> None:
    (OUT / "rope").mkdir(exist_ok=True)
    np.savez_compressed(OUT / "rope" / "hf_frequencies.npz", **rope_frequencies())
    total = 0
    for name in [*CASES, "chatglm"]:
        case = to_chatglm(make_case("glm")) if name == "chatglm" else make_case(name)
        path = OUT / f"{name}.npz"
        np.savez_compressed(path, **case)
        total += path.stat().st_size
        print(f"{name:24s} {path.stat().st_size:8d} bytes, logits std {case['logits'].std():.2f}")
    print(f"{total / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
