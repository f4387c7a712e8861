"""GLM-4 checkpoints: transformers' `glm`, the original `chatglm`, and GGUF."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from models.common.config import DecoderConfig
from models.common.weights.attributes import Attributes
from models.common.weights.decoder_attributes import (
    IRRELEVANT,
    build_config,
    gguf_sizes,
    read_common_hf,
)
from models.common.weights.rope_scaling import gguf_rope_scaling, make_rope, rope_from_hf
from models.common.weights.table import Naming, linear

HF_MODEL_TYPES = ("glm", "chatglm")
GGUF_ARCHITECTURES = ("chatglm",)

_QKV = tuple(f"layers.attention.{name}_proj" for name in "qkv")
_MLP = "layers.mlp"


_GLM = Naming(
    tensors={
        "model.embed_tokens.weight": ("embed.embedding",),
        "model.layers.{layer}.input_layernorm.weight": ("layers.input_norm.scale",),
        **linear("model.layers.{layer}.self_attn.q_proj", _QKV[0]),
        **linear("model.layers.{layer}.self_attn.k_proj", _QKV[1]),
        **linear("model.layers.{layer}.self_attn.v_proj", _QKV[2]),
        **linear("model.layers.{layer}.self_attn.o_proj", "layers.attention.o_proj"),
        "model.layers.{layer}.post_attention_layernorm.weight": (
            "layers.post_attention_norm.scale",
        ),
        **linear("model.layers.{layer}.mlp.gate_up_proj", f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
        **linear("model.layers.{layer}.mlp.down_proj", f"{_MLP}.down_proj"),
        "model.norm.weight": ("final_norm.scale",),
        "lm_head.weight": ("lm_head.kernel",),
    },
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
_CHATGLM_LAYER = "transformer.encoder.layers.{layer}"
_CHATGLM = Naming(
    tensors={
        "transformer.embedding.word_embeddings.weight": ("embed.embedding",),
        f"{_CHATGLM_LAYER}.input_layernorm.weight": ("layers.input_norm.scale",),
        **linear(f"{_CHATGLM_LAYER}.self_attention.query_key_value", *_QKV),
        **linear(f"{_CHATGLM_LAYER}.self_attention.dense", "layers.attention.o_proj"),
        f"{_CHATGLM_LAYER}.post_attention_layernorm.weight": ("layers.post_attention_norm.scale",),
        **linear(f"{_CHATGLM_LAYER}.mlp.dense_h_to_4h", f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
        **linear(f"{_CHATGLM_LAYER}.mlp.dense_4h_to_h", f"{_MLP}.down_proj"),
        "transformer.encoder.final_layernorm.weight": ("final_norm.scale",),
        "transformer.output_layer.weight": ("lm_head.kernel",),
    },
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
)
_GGUF = Naming(
    tensors={
        "token_embd.weight": ("embed.embedding",),
        "blk.{layer}.attn_norm.weight": ("layers.input_norm.scale",),
        **linear("blk.{layer}.attn_qkv", *_QKV),
        **linear("blk.{layer}.attn_q", _QKV[0]),
        **linear("blk.{layer}.attn_k", _QKV[1]),
        **linear("blk.{layer}.attn_v", _QKV[2]),
        **linear("blk.{layer}.attn_output", "layers.attention.o_proj"),
        "blk.{layer}.ffn_norm.weight": ("layers.post_attention_norm.scale",),
        **linear("blk.{layer}.ffn_up", f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
        **linear("blk.{layer}.ffn_down", f"{_MLP}.down_proj"),
        "output_norm.weight": ("final_norm.scale",),
        "output.weight": ("lm_head.kernel",),
    },
    ignored=(r"rope_freqs\.weight",),
)


def hf_naming(config: DecoderConfig, model_type: str) -> Naming:
    """Where the tensors of a checkpoint of this style go."""
    naming = _GLM if model_type == "glm" else _CHATGLM
    if not config.tie_embeddings:
        return naming
    repeated = (r"lm_head\.weight", r"transformer\.output_layer\.weight")
    return Naming(tensors=naming.tensors, ignored=(*naming.ignored, *repeated))


def gguf_naming() -> Naming:
    """Where the tensors of a GGUF file go."""
    return _GGUF


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads the `config.json` of a glm or chatglm model.

    Raises:
        LoadError: attributes are missing, unsupported or unknown; all of them are named.
    """
    kind = values["model_type"]
    attributes = Attributes(values, f"the configuration (`model_type` {kind!r})")
    return _from_glm(attributes) if kind == "glm" else _from_chatglm(attributes)


def _from_glm(attributes: Attributes) -> DecoderConfig:
    read_common_hf(attributes)
    heads = attributes.require("num_attention_heads", int)
    width = attributes.require("hidden_size", int)
    max_position = attributes.require("max_position_embeddings", int)
    head_dim = int(attributes.take("head_dim", 128))
    rope = rope_from_hf(
        attributes,
        head_dim=head_dim,
        max_position=max_position,
        interleaved=True,
        default_partial=0.5,
        partial=True,
    )
    return build_config(
        attributes,
        rope=rope,
        vocab_size=attributes.require("vocab_size", int),
        embed_dim=width,
        hidden_dim=attributes.require("intermediate_size", int),
        num_layers=attributes.require("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=int(attributes.take("num_key_value_heads", heads)),
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=attributes.require("rms_norm_eps", float),
        qkv_bias=bool(attributes.take("attention_bias", True)),
        tie_embeddings=bool(attributes.take("tie_word_embeddings", False)),
    )


def _from_chatglm(attributes: Attributes) -> DecoderConfig:
    attributes.ignore(IRRELEVANT)
    # These choose data types or the order of equal operations, or repeat another attribute.
    attributes.ignore(
        [
            "apply_query_key_layer_scaling",
            "attention_softmax_in_fp32",
            "fp32_residual_connection",
            "num_hidden_layers",
            "vocab_size",
        ]
    )
    attributes.expect("apply_residual_connection_post_layernorm", False)
    attributes.expect("post_layer_norm", True)
    attributes.expect("rmsnorm", True)
    attributes.expect("original_rope", True)
    attributes.expect("interleaved_qkv", False)
    attributes.expect("pre_seq_len", 0)
    attributes.expect("prefix_projection", False)
    attributes.expect("quantization_bit", 0)
    attributes.expect("is_encoder_decoder", False)
    heads = attributes.require("num_attention_heads", int)
    head_dim = attributes.require("kv_channels", int)
    grouped = attributes.take("multi_query_attention", False)
    groups = int(attributes.take("multi_query_group_num", 1))
    linear_bias = bool(attributes.take("add_bias_linear", True))
    return build_config(
        attributes,
        rope=make_rope(
            attributes,
            theta=10000.0 * float(attributes.take("rope_ratio", 1.0)),
            rotary_dim=head_dim // 2,
            interleaved=True,
            scaling=None,
        ),
        vocab_size=attributes.require("padded_vocab_size", int),
        embed_dim=attributes.require("hidden_size", int),
        hidden_dim=attributes.require("ffn_hidden_size", int),
        num_layers=attributes.require("num_layers", int),
        num_heads=heads,
        num_kv_heads=groups if grouped else heads,
        head_dim=head_dim,
        max_position=attributes.require("seq_length", int),
        norm_eps=attributes.require("layernorm_epsilon", float),
        qkv_bias=bool(attributes.take("add_qkv_bias", False)) or linear_bias,
        o_bias=linear_bias,
        mlp_bias=linear_bias,
        tie_embeddings=bool(attributes.take("tie_word_embeddings", False)),
    )


def config_from_gguf(
    values: Mapping[str, Any],
    tensors: Collection[str],
    *,
    vocab_size: int,
    rope_factors: Mapping[str, Sequence[float]],
) -> DecoderConfig:
    """Reads the metadata of a GGUF file of architecture chatglm.

    Args:
        values: the metadata keys of this architecture.
        tensors: the names of the stored tensors, which say what biases and heads there are.
        vocab_size: rows of the embedding tensor.
        rope_factors: the tensor `rope_freqs`, where there is one.

    Raises:
        LoadError: keys are missing, unsupported or unknown; all of them are named.
    """
    attributes = Attributes(values, "the GGUF metadata (architecture 'chatglm')")
    sizes = gguf_sizes(attributes, "chatglm", vocab_size)
    scaling = gguf_rope_scaling(
        attributes,
        prefix="chatglm.rope.scaling",
        max_position=sizes["max_position"],
        frequency_divisors=rope_factors.get("rope_freqs"),
        long_divisors=None,
    )
    rope = make_rope(
        attributes,
        theta=float(attributes.take("chatglm.rope.freq_base", 10000.0)),
        rotary_dim=int(attributes.take("chatglm.rope.dimension_count", sizes["head_dim"])),
        interleaved=True,
        scaling=scaling,
    )
    return build_config(
        attributes,
        rope=rope,
        qkv_bias="blk.0.attn_qkv.bias" in tensors or "blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        **sizes,
    )
