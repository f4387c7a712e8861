"""GGUF files written with the `gguf` package, read back; damaged files are explained."""

import contextlib
import dataclasses
import re
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LoadError, load_model
from models.common.config import LinearScaling, LongRopeScaling, YarnScaling
from models.common.decoder import forward
from models.common.weights.gguf import GGUFFile
from tests.models.checkpoints import LLAMA_METADATA, golden, to_gguf_names, write_gguf, write_hf
from tests.models.test_load import DENSE, logits_of


def gguf_metadata(config, *, rotary=None):
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        "rope.dimension_count": rotary or head_dim,
    }


def random_llama(seed=0):
    """Hugging Face tensors of the shapes that LLAMA_METADATA describes."""
    rng = np.random.default_rng(seed)
    width, hidden, heads, kv_heads = 64, 96, 64, 32
    shapes = {"model.embed_tokens.weight": (64, width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (64, width)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (heads, width),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads, width),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads, width),
            f"{prefix}.self_attn.o_proj.weight": (width, heads),
            f"{prefix}.mlp.gate_proj.weight": (hidden, width),
            f"{prefix}.mlp.up_proj.weight": (hidden, width),
            f"{prefix}.mlp.down_proj.weight": (width, hidden),
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def llama_file(path, *, quantisation="F32", changes=None, extra=None, **kwargs):
    tensors = to_gguf_names(random_llama(), rotated_heads=(4, 2)) | (extra or {})
    metadata = {**LLAMA_METADATA, **(changes or {})}
    return write_gguf(path, "llama", metadata, tensors, quantisation=quantisation, **kwargs)


def assert_same_model(tmp_path, path, config, tensors):
    """The file's model is the one of the Hugging Face directory, but for GGUF's fp32 epsilon."""
    expected = load_model(write_hf(tmp_path / "hf", config, tensors), dtype=jnp.float32)
    model = load_model(path, dtype=jnp.float32)
    eps = float(np.float32(expected.config.norm_eps))
    assert model.config == dataclasses.replace(expected.config, norm_eps=eps)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_parameters_equal_the_dequantised_tensors(tmp_path, quantisation):
    path = llama_file(tmp_path / "model.gguf", quantisation=quantisation)
    kind = gguf.GGMLQuantizationType[quantisation]
    tensors = {
        # Rows are quantised one by one, so reordering them commutes with it.
        name: tensor if tensor.ndim == 1 else gguf.quants.dequantize(
            gguf.quants.quantize(tensor, kind), kind
        )
        for name, tensor in random_llama().items()
    }  # fmt: skip
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    assert_same_model(tmp_path, path, config, tensors)


@pytest.mark.parametrize("name", ["llama-mha", "llama-tied", "llama-bias", "qwen2", "phi3"])
def test_llama_like_files_equal_their_hugging_face_originals(tmp_path, name):
    config, tensors, _ = golden(name)
    kind = config["model_type"]
    rotated = (4, config["num_key_value_heads"]) if kind == "llama" else None
    stored = to_gguf_names(tensors, rotated_heads=rotated)
    path = write_gguf(tmp_path / "model.gguf", kind, gguf_metadata(config), stored)
    assert_same_model(tmp_path, path, config, tensors)


def test_logits_of_a_llama_file_equal_transformers(tmp_path):
    config, tensors, case = golden("llama-gqa")
    stored = to_gguf_names(tensors, rotated_heads=(4, 2))
    path = write_gguf(tmp_path / "model.gguf", "llama", gguf_metadata(config), stored)
    model = load_model(path, dtype=jnp.float32)
    assert model.name == "model"  # none is declared
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused-qkv", "separate-qkv"])
def test_glm_files_equal_their_hugging_face_originals(tmp_path, fused):
    config, tensors, _ = golden("glm")
    stored = to_gguf_names(tensors)
    for layer in range(config["num_hidden_layers"] if fused else 0):
        for kind in ("weight", "bias"):
            parts = [stored.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
            stored[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    metadata = gguf_metadata(config, rotary=8)
    path = write_gguf(tmp_path / "model.gguf", "chatglm", metadata, stored)
    assert_same_model(tmp_path, path, config, tensors)


def test_phi3_frequency_factors_are_read(tmp_path):
    config, tensors, case = golden("phi3-longrope-long")
    rope = config["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("short", "long")
    }
    metadata = gguf_metadata(config) | {
        "rope.scaling.original_context_length": 32,
        "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(32))),
    }
    path = write_gguf(
        tmp_path / "model.gguf", "phi3", metadata, to_gguf_names(tensors) | factors, name="Phi 3"
    )
    model = load_model(path, dtype=jnp.float32)
    assert model.name == "Phi 3"
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


def test_llama3_frequency_factors_are_read(tmp_path):
    config, tensors, case = golden("llama-llama3")
    scaling = config["rope_scaling"]
    frequencies = config["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
    # Llama 3.1's published rule, as llama.cpp's converter evaluates it into one divisor each.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    path = write_gguf(
        tmp_path / "model.gguf",
        "llama",
        gguf_metadata(config),
        to_gguf_names(tensors, rotated_heads=(4, 2)) | {"rope_freqs.weight": divisors},
    )
    model = load_model(path, dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"rope.scaling.type": "none"}, None, id="none-stated"),
        pytest.param(
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            LinearScaling(factor=4.0),
            id="linear",
        ),
        pytest.param(
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            YarnScaling(
                factor=4.0,
                original_max_position=32,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=0.1 * np.log(4.0) + 1,
                truncate=True,
            ),
            id="yarn",
        ),
    ],
)
def test_rope_scaling_is_read(tmp_path, changes, expected):
    model = load_model(llama_file(tmp_path / "model.gguf", changes=changes))
    assert model.config.rope.scaling == expected


def test_equal_frequency_factors_need_no_length(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    path = llama_file(tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors})
    scaling = load_model(path).config.rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.short_factor == scaling.long_factor == tuple(divisors.tolist())
    assert scaling.attention_factor == 1.0


def test_everything_unsupported_is_named_at_once(tmp_path):
    changes = {
        "attention.sliding_window": 16,
        "expert_count": 8,
        "rope.dimension_count": 4,
        "rope.scaling.type": "mystery",
        "attn_logit_softcapping": 30.0,
    }
    path = llama_file(tmp_path / "model.gguf", changes=changes)
    with pytest.raises(LoadError) as raised:
        load_model(path)
    for name in ("sliding_window` = 16", "expert_count` = 8", "dimension_count` = 4", "'mystery'"):
        assert name in str(raised.value)
    assert "`llama.attn_logit_softcapping` = 30.0 is not known" in str(raised.value)


def test_unsupported_architectures_name_the_supported(tmp_path):
    tensors = to_gguf_names(random_llama())
    path = write_gguf(tmp_path / "model.gguf", "glm4", LLAMA_METADATA, tensors)
    with pytest.raises(LoadError, match=r"'glm4' is not supported.*llama, qwen2, phi3, chatglm"):
        load_model(path)


def test_a_file_without_tokenizer_is_explained(tmp_path):
    path = llama_file(tmp_path / "model.gguf", tokenizer=False)
    with pytest.raises(LoadError, match=r"has no tokenizer.*`tokenizer=`"):
        load_model(path)


def test_a_file_that_is_not_gguf_is_explained(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(LoadError, match=r"is not a GGUF file: it must begin with b'GGUF'"):
        load_model(path)


@pytest.mark.parametrize("kept", [0, 3, 4, 10, 30, 100, 700, 0.5, 0.99])
def test_truncated_files_are_explained(tmp_path, kept):
    path = llama_file(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(LoadError, match=re.escape(str(path))):
        load_model(path)


@pytest.mark.parametrize("seed", range(6))
def test_corrupt_headers_never_end_in_another_error(tmp_path, seed):
    path = llama_file(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for position in rng.integers(4, 400, size=3):
        data[position] = rng.integers(0, 256)
    path.write_bytes(data)
    with contextlib.suppress(LoadError):  # a changed letter of a description may also load
        load_model(path)


def test_absurd_counts_are_explained(tmp_path):
    path = llama_file(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[8:16] = struct.pack("<Q", 2**60)  # number of tensors
    path.write_bytes(data)
    with pytest.raises(LoadError, match="damaged"):
        GGUFFile(path)


def test_reading_streams_a_few_rows_at_a_time(tmp_path, monkeypatch):
    path = llama_file(tmp_path / "model.gguf", quantisation="Q8_0")
    expected = load_model(path, dtype=jnp.float32)
    monkeypatch.setattr("models.common.weights.table._CHUNK_ELEMENTS", 200)
    sizes = []
    read = GGUFFile.read

    def spy(self, name, start, stop):
        values = read(self, name, start, stop)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(GGUFFile, "read", spy)
    model = load_model(path, dtype=jnp.float32)
    assert max(sizes) <= 200
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    assert forward(
        model.params, jnp.zeros((1, 3), jnp.int32), config=model.config, attention_fn=DENSE
    ).shape == (1, 3, 64)
