"""Weight files that do not fit are reported completely, before anything is converted."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models import LoadError, load_model
from models.common.weights import table
from models.common.weights.errors import summarise_names
from models.common.weights.safetensors import SafetensorsDirectory
from tests.models.checkpoints import golden, write_hf


def test_every_mismatch_is_reported_at_once_and_nothing_is_read(tmp_path, monkeypatch):
    config, tensors, _ = golden("llama-gqa")
    for layer in range(2):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.ones((8, 32), np.float32)
    write_hf(tmp_path, config, tensors)
    monkeypatch.setattr(SafetensorsDirectory, "read", lambda *args: pytest.fail("read too early"))
    with pytest.raises(LoadError) as raised:
        load_model(tmp_path)
    message = str(raised.value)
    assert "model.layers.*.mlp.up_proj.weight (layers 0-1)" in message
    assert "model.norm.weight" in message
    assert "model.layers.*.self_attn.q_norm.weight (layers 0)" in message
    assert "model.layers.1.self_attn.k_proj.weight is [8, 32], expected [32, 32]" in message


def test_biases_the_configuration_does_not_mention_are_reported(tmp_path):
    config, tensors, _ = golden("llama-bias")
    write_hf(tmp_path, {**config, "attention_bias": False}, tensors)
    with pytest.raises(LoadError, match=r"self_attn\.q_proj\.bias \(layers 0-1\)"):
        load_model(tmp_path)


def test_mixed_layouts_are_reported(tmp_path):
    config, tensors, _ = golden("phi3")
    fused = tensors.pop("model.layers.1.self_attn.qkv_proj.weight")
    for name, rows in zip("qkv", np.split(fused, [48, 72]), strict=True):
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"] = rows.copy()
    write_hf(tmp_path, config, tensors)
    with pytest.raises(LoadError, match=r"qkv_proj|q_proj"):
        load_model(tmp_path)


def test_fused_and_separate_tensors_give_the_same_parameters(tmp_path):
    config, fused, _ = golden("phi3")
    separate = dict(fused)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        qkv = separate.pop(f"{prefix}.self_attn.qkv_proj.weight")
        for name, rows in zip("qkv", np.split(qkv, [48, 72]), strict=True):
            separate[f"{prefix}.self_attn.{name}_proj.weight"] = rows.copy()
        gate_up = separate.pop(f"{prefix}.mlp.gate_up_proj.weight")
        for name, rows in zip(("gate", "up"), np.split(gate_up, 2), strict=True):
            separate[f"{prefix}.mlp.{name}_proj.weight"] = rows.copy()
    first = load_model(write_hf(tmp_path / "fused", config, fused))
    second = load_model(write_hf(tmp_path / "separate", config, separate))
    left, right = table.flatten_paths(first.params), table.flatten_paths(second.params)
    assert left.keys() == right.keys()
    assert all((left[path] == right[path]).all() for path in left)


def test_a_repeated_tied_head_is_ignored(tmp_path):
    config, tensors, _ = golden("llama-tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "lm_head" not in load_model(write_hf(tmp_path, config, tensors)).params


def test_missing_shards_are_reported_at_once(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, config, tensors, shards=4)
    (tmp_path / "model-00001.safetensors").unlink()
    (tmp_path / "model-00003.safetensors").unlink()
    with pytest.raises(
        LoadError,
        match=r"lacks 2 of the 4 files .*model-00001\.safetensors, model-00003\.safetensors",
    ):
        load_model(tmp_path)


def test_a_directory_without_weights_is_explained(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, config, tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"neither.*convert pytorch_model\.bin to them"):
        load_model(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_truncated_files_are_explained(tmp_path, kept):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, config, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LoadError, match=re.escape(str(path)) + ".*download it again"):
        load_model(tmp_path)


def test_a_damaged_index_is_explained(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, config, tensors, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps([1]))
    with pytest.raises(LoadError, match="no index of safetensors files"):
        load_model(tmp_path)


def test_quantised_tensors_are_named(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, config, tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=re.escape(f"{name} (F8_E4M3)")):
        load_model(tmp_path)


def test_names_are_merged_by_layer_without_losing_any():
    names = ["h.0.w", "h.1.w", "h.3.w", "norm", "h.2.b"]
    assert summarise_names(names) == ["h.*.w (layers 0-1, 3)", "norm", "h.*.b (layers 2)"]
