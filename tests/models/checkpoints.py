"""Checkpoints on disk, made from the golden cases or from nothing."""

import json
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def golden(name):
    """(configuration, tensors by Hugging Face name, the whole file)."""
    case = np.load(GOLDEN / f"{name}.npz")
    tensors = {key[7:]: case[key] for key in case.files if key.startswith("tensor:")}
    return json.loads(str(case["config.json"])), tensors, case


def write_hf(directory, config, tensors, *, shards=1):
    """A Hugging Face directory with words `t0`, `t1`, … as its vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, config.get("vocab_size", 64))
    names = sorted(tensors)
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        safetensors.numpy.save_file(part, directory / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def write_tokenizer(directory, vocab_size):
    vocab = {f"t{i}": i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(directory / "tokenizer.json"))


def words(ids):
    return " ".join(f"t{i}" for i in ids)


LLAMA_METADATA = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def write_gguf(
    path, architecture, metadata, tensors, *, quantisation="F32", tokenizer=True, name=None
):
    """A GGUF file; matrices are quantised, vectors stay fp32."""
    writer = gguf.GGUFWriter(path, architecture)
    if name is not None:
        writer.add_name(name)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    if tokenizer:
        tokens = ["t", "0", "t0"] + [f"t{i}" for i in range(3, 64)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        kinds = [gguf.TokenType.NORMAL] * 3 + [gguf.TokenType.USER_DEFINED] * 61
        writer.add_token_types(kinds)
        writer.add_token_merges(["t 0"])
        writer.add_eos_token_id(2)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or quantisation == "F32":
            writer.add_tensor(name, tensor.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def to_gguf_names(tensors, *, rotated_heads=None):
    """Hugging Face tensors as llama.cpp's converter writes them.

    Args:
        tensors: by Hugging Face name.
        rotated_heads: (query heads, key heads) where the converter reorders rows for its rotation.
    """
    out = {}
    for name, tensor in tensors.items():
        for heads, part in zip(rotated_heads or (), ("q_proj", "k_proj"), strict=False):
            if part in name:
                half = tensor.shape[0] // heads // 2
                grouped = tensor.reshape(heads, 2, half, *tensor.shape[1:])
                tensor = grouped.swapaxes(1, 2).reshape(tensor.shape)
        for old, new in _TO_GGUF.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out
