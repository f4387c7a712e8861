"""Llama-like checkpoints: Llama, Mistral, Yi, Qwen2/2.5 and Phi-3, from Hugging Face and GGUF."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from models.common.config import DecoderConfig
from models.common.weights.attributes import Attributes
from models.common.weights.decoder_attributes import (
    build_config,
    full_attention_only,
    gguf_sizes,
    read_common_hf,
)
from models.common.weights.rope_scaling import gguf_rope_scaling, make_rope, rope_from_hf
from models.common.weights.table import Naming, linear

HF_MODEL_TYPES = ("llama", "mistral", "qwen2", "phi3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "phi3")

_Q, _K, _V = (f"layers.attention.{name}_proj" for name in "qkv")
_O = "layers.attention.o_proj"
_GATE, _UP, _DOWN = (f"layers.mlp.{name}_proj" for name in ("gate", "up", "down"))


HF_NAMING = Naming(
    tensors={
        "model.embed_tokens.weight": ("embed.embedding",),
        "model.layers.{layer}.input_layernorm.weight": ("layers.input_norm.scale",),
        **linear("model.layers.{layer}.self_attn.q_proj", _Q),
        **linear("model.layers.{layer}.self_attn.k_proj", _K),
        **linear("model.layers.{layer}.self_attn.v_proj", _V),
        **linear("model.layers.{layer}.self_attn.qkv_proj", _Q, _K, _V),  # Phi-3
        **linear("model.layers.{layer}.self_attn.o_proj", _O),
        "model.layers.{layer}.post_attention_layernorm.weight": (
            "layers.post_attention_norm.scale",
        ),
        **linear("model.layers.{layer}.mlp.gate_proj", _GATE),
        **linear("model.layers.{layer}.mlp.up_proj", _UP),
        **linear("model.layers.{layer}.mlp.gate_up_proj", _GATE, _UP),  # Phi-3
        **linear("model.layers.{layer}.mlp.down_proj", _DOWN),
        "model.norm.weight": ("final_norm.scale",),
        "lm_head.weight": ("lm_head.kernel",),
    },
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
# With tied embeddings some writers repeat the shared matrix; transformers ignores the copy, too.
HF_NAMING_TIED = Naming(tensors=HF_NAMING.tensors, ignored=(*HF_NAMING.ignored, r"lm_head\.weight"))

_GGUF_TENSORS = {
    "token_embd.weight": ("embed.embedding",),
    "blk.{layer}.attn_norm.weight": ("layers.input_norm.scale",),
    **linear("blk.{layer}.attn_q", _Q),
    **linear("blk.{layer}.attn_k", _K),
    **linear("blk.{layer}.attn_v", _V),
    **linear("blk.{layer}.attn_output", _O),
    "blk.{layer}.ffn_norm.weight": ("layers.post_attention_norm.scale",),
    **linear("blk.{layer}.ffn_gate", _GATE),
    **linear("blk.{layer}.ffn_up", _UP),
    **linear("blk.{layer}.ffn_down", _DOWN),
    "output_norm.weight": ("final_norm.scale",),
    "output.weight": ("lm_head.kernel",),
}
_FUSED = {
    **linear("blk.{layer}.attn_qkv", _Q, _K, _V),
    **linear("blk.{layer}.ffn_up", _GATE, _UP),
}
_ROPE_TENSORS = (
    r"rope_freqs\.weight",
    r"rope_factors_(long|short)\.weight",
    r"blk\.\d+\.attn_rot_embd",
)

# llama.cpp rotates neighbouring dimensions in this one architecture and reorders q and k for it.
_GGUF_LLAMA = Naming(
    tensors=_GGUF_TENSORS,
    interleaved=frozenset(f"{path}.{kind}" for path in (_Q, _K) for kind in ("kernel", "bias")),
    ignored=_ROPE_TENSORS,
)
_GGUF_PLAIN = Naming(tensors=_GGUF_TENSORS, ignored=_ROPE_TENSORS)
GGUF_FUSED = Naming(tensors={**_GGUF_TENSORS, **_FUSED}, ignored=_ROPE_TENSORS)


def gguf_naming(architecture: str) -> Naming:
    """Where the tensors of a GGUF file of this architecture go."""
    return {"llama": _GGUF_LLAMA, "qwen2": _GGUF_PLAIN, "phi3": GGUF_FUSED}[architecture]


def hf_naming(config: DecoderConfig) -> Naming:
    """Where the tensors of a Hugging Face checkpoint go."""
    return HF_NAMING_TIED if config.tie_embeddings else HF_NAMING


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads the `config.json` of a llama, mistral, qwen2 or phi3 model.

    Raises:
        LoadError: attributes are missing, unsupported or unknown; all of them are named.
    """
    kind = values["model_type"]
    attributes = Attributes(values, f"the configuration (`model_type` {kind!r})")
    read_common_hf(attributes)
    heads = attributes.require("num_attention_heads", int)
    width = attributes.require("hidden_size", int)
    layers = attributes.require("num_hidden_layers", int)
    max_position = attributes.require("max_position_embeddings", int)
    head_dim = int(attributes.take("head_dim", width // heads))
    attention_bias, mlp_bias = _hf_biases(attributes, kind)
    _hf_windows(attributes, kind, layers, max_position)
    attributes.expect("rope_interleaved", False)
    rope = rope_from_hf(
        attributes,
        head_dim=head_dim,
        max_position=max_position,
        partial=kind == "phi3",
        aliases={"su": "longrope", "yarn": "longrope"} if kind == "phi3" else None,
    )
    return build_config(
        attributes,
        rope=rope,
        vocab_size=attributes.require("vocab_size", int),
        embed_dim=width,
        hidden_dim=attributes.require("intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(attributes.take("num_key_value_heads", heads)),
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=attributes.require("rms_norm_eps", float),
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_embeddings=bool(attributes.take("tie_word_embeddings", False)),
    )


def _hf_biases(attributes: Attributes, kind: str) -> tuple[bool, bool]:
    if kind == "llama":  # q, k, v and the output projection together
        return bool(attributes.take("attention_bias", False)), bool(
            attributes.take("mlp_bias", False)
        )
    attributes.expect("attention_bias", *([True, False] if kind == "qwen2" else [False]))
    attributes.expect("mlp_bias", False)
    return False, False


def _hf_windows(attributes: Attributes, kind: str, layers: int, max_position: int) -> None:
    used = True
    if kind == "qwen2":
        first_windowed = attributes.take("max_window_layers", layers)
        used = bool(attributes.take("use_sliding_window", False)) and first_windowed < layers
        attributes.expect("use_mrope", False)
    full_attention_only(attributes, max_position, used=used)
    kinds = attributes.take("layer_types", [])
    if any(kind != "full_attention" for kind in kinds):
        attributes.refuse(f"`layer_types` = {kinds!r}, supported: 'full_attention' everywhere")


def config_from_gguf(
    values: Mapping[str, Any],
    tensors: Collection[str],
    *,
    vocab_size: int,
    rope_factors: Mapping[str, Sequence[float]],
) -> DecoderConfig:
    """Reads the metadata of a GGUF file of architecture llama, qwen2 or phi3.

    Args:
        values: the metadata keys of this architecture.
        tensors: the names of the stored tensors, which say what biases and heads there are.
        vocab_size: rows of the embedding tensor.
        rope_factors: the tensors `rope_freqs`, `rope_factors_short` and `rope_factors_long`.

    Raises:
        LoadError: keys are missing, unsupported or unknown; all of them are named.
    """
    kind = next(iter(values), "llama").split(".")[0]
    attributes = Attributes(values, f"the GGUF metadata (architecture {kind!r})")
    sizes = gguf_sizes(attributes, kind, vocab_size)
    head_dim, max_position = sizes["head_dim"], sizes["max_position"]
    rotary = int(attributes.take(f"{kind}.rope.dimension_count", head_dim))
    if rotary != head_dim and kind != "phi3":
        attributes.refuse(f"`{kind}.rope.dimension_count` = {rotary}, supported: {head_dim}")
    window = attributes.take(f"{kind}.attention.sliding_window", 0)
    if 0 < window < max_position:
        attributes.refuse(
            f"`{kind}.attention.sliding_window` = {window} is shorter than the context of "
            f"{max_position} tokens; only full attention is built in"
        )
    attributes.expect(f"{kind}.expert_count", 0)
    attributes.expect(f"{kind}.expert_used_count", 0)
    divisors = rope_factors.get("rope_freqs", rope_factors.get("rope_factors_short"))
    scaling = gguf_rope_scaling(
        attributes,
        prefix=f"{kind}.rope.scaling",
        max_position=max_position,
        frequency_divisors=divisors,
        long_divisors=rope_factors.get("rope_factors_long"),
    )
    theta = float(attributes.take(f"{kind}.rope.freq_base", 10000.0))
    return build_config(
        attributes,
        rope=make_rope(
            attributes, theta=theta, rotary_dim=rotary, interleaved=False, scaling=scaling
        ),
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        **sizes,
    )
