"""Attributes that the decoders of Hugging Face and GGUF share, and those that change nothing."""

from typing import Any

from models.common.config import DecoderConfig, RopeConfig
from models.common.weights.attributes import Attributes
from models.common.weights.errors import LoadError

# Token ids are read by the tokenizer; dropout and initialisation matter in training only; the rest
# names files, classes, data types, or settings of outputs, caches and generation.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    add_cross_attention architectures attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bias_dropout_fusion bos_token_id chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout hidden_dropout_prob id2label initializer_range is_decoder is_llama_config
    keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905, words read better than 80 quoted strings
)


def read_common_hf(attributes: Attributes) -> None:
    """Accounts for what every Hugging Face configuration may carry."""
    attributes.ignore(IRRELEVANT)
    attributes.expect("is_encoder_decoder", False)
    attributes.expect("tie_encoder_decoder", False)
    attributes.expect("pruned_heads", {})
    attributes.expect("hidden_act", "silu", "swish")


def full_attention_only(attributes: Attributes, max_position: int, *, used: bool = True) -> None:
    """Refuses sliding windows that would hide keys inside the context."""
    window = attributes.take("sliding_window")
    if used and window is not None and window < max_position:
        attributes.refuse(
            f"`sliding_window` = {window!r} is shorter than the context of {max_position} tokens; "
            "only full attention is built in"
        )


def build_config(attributes: Attributes, *, rope: RopeConfig, **sizes: Any) -> DecoderConfig:
    """Makes the configuration once every attribute is accounted for.

    Raises:
        LoadError: attributes are unsupported or do not fit together.
    """
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        attributes.refuse(
            f"{sizes['num_heads']} query heads are not a multiple of {sizes['num_kv_heads']} "
            "key/value heads"
        )
    attributes.finish()
    try:
        return DecoderConfig(rope=rope, **sizes)
    except ValueError as error:
        raise LoadError(f"the model's configuration does not fit together: {error}") from error


def gguf_sizes(attributes: Attributes, architecture: str, vocab_size: int) -> dict[str, Any]:
    """Sizes under GGUF's key names."""
    key = f"{architecture}.{{}}".format
    heads = attributes.require(key("attention.head_count"), int)
    width = attributes.require(key("embedding_length"), int)
    kv_heads = attributes.take(key("attention.head_count_kv"), heads)
    head_dim = int(attributes.take(key("attention.key_length"), width // heads))
    attributes.expect(key("attention.value_length"), head_dim)
    if not isinstance(kv_heads, int):
        attributes.refuse(f"`{key('attention.head_count_kv')}` = {kv_heads!r} differs by layer")
        kv_heads = 1
    attributes.ignore([key("vocab_size")])  # the embedding tensor says
    return {
        "vocab_size": vocab_size,
        "embed_dim": width,
        "hidden_dim": attributes.require(key("feed_forward_length"), int),
        "num_layers": attributes.require(key("block_count"), int),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": attributes.require(key("context_length"), int),
        "norm_eps": attributes.require(key("attention.layer_norm_rms_epsilon"), float),
    }
