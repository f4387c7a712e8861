"""Checkpoints converted once: the same model comes back, spread over devices when asked."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import LoadError, abstract_model, load_model, save_checkpoint
from models.common.decoder import abstract_params
from models.common.weights.sharding import param_sharding
from models.common.weights.table import flatten_paths
from tests.models.checkpoints import golden, write_hf
from tests.models.test_load import logits_of


def saved(tmp_path, name):
    config, tensors, case = golden(name)
    model = load_model(write_hf(tmp_path / "hf", config, tensors), dtype=jnp.float32)
    save_checkpoint(
        tmp_path / "saved", config=model.config, params=model.params, tokenizer=model.tokenizer
    )
    return model, tmp_path / "saved", case


@pytest.mark.parametrize("name", ["llama-llama3", "phi3-longrope-long", "chatglm", "llama-tied"])
def test_a_saved_model_comes_back_the_same(tmp_path, name):
    model, directory, _ = saved(tmp_path, name)
    restored = load_model(directory, dtype=jnp.float32)
    assert restored.config == model.config
    jax.tree.map(np.testing.assert_array_equal, restored.params, model.params)
    assert restored.tokenizer.encode("t5 t9") == [5, 9]
    assert restored.tokenizer.stop_tokens == model.tokenizer.stop_tokens


def test_an_abstract_model_is_what_would_be_loaded(tmp_path):
    model, directory, _ = saved(tmp_path, "llama-gqa")
    longer = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    for source in (directory, tmp_path / "hf"):
        shapes = abstract_model(source, dtype=jnp.bfloat16, **longer)
        assert shapes.config == load_model(source, **longer).config
        assert shapes.config.max_position == 2 * model.config.max_position
        assert shapes.tokenizer.encode("t5 t9") == [5, 9]
        found = jax.tree.map(lambda x: (x.shape, x.dtype), shapes.params)
        assert found == jax.tree.map(lambda x: (x.shape, jnp.bfloat16), model.params)


def test_restoring_converts_to_the_dtype_asked_for(tmp_path):
    model, directory, _ = saved(tmp_path, "llama-gqa")
    restored = load_model(directory, dtype=jnp.bfloat16)
    jax.tree.map(
        lambda got, want: np.testing.assert_array_equal(got, want.astype(jnp.bfloat16)),
        restored.params,
        model.params,
    )


def test_restoring_spreads_parameters_over_devices(tmp_path):
    _, directory, case = saved(tmp_path, "llama-gqa")
    mesh = jax.make_mesh((2,), ("model",))
    restored = load_model(directory, dtype=jnp.float32, mesh=mesh)
    for path, leaf in flatten_paths(restored.params).items():
        assert leaf.sharding.is_equivalent_to(param_sharding(path, leaf.shape, mesh), leaf.ndim)
    split = {
        path
        for path, leaf in flatten_paths(restored.params).items()
        if not leaf.sharding.is_fully_replicated
    }
    assert split == {
        "embed.embedding",
        "lm_head.kernel",
        *(f"layers.attention.{name}_proj.kernel" for name in "qkvo"),
        *(f"layers.mlp.{name}_proj.kernel" for name in ("gate", "up", "down")),
    }
    np.testing.assert_allclose(logits_of(restored, case["tokens"]), case["logits"], atol=1e-4)


def test_a_sharded_model_is_saved_as_well(tmp_path):
    config, tensors, _ = golden("qwen2")
    mesh = jax.make_mesh((2,), ("model",))
    model = load_model(write_hf(tmp_path / "hf", config, tensors), dtype=jnp.float32, mesh=mesh)
    save_checkpoint(
        tmp_path / "saved", config=model.config, params=model.params, tokenizer=model.tokenizer
    )
    restored = load_model(tmp_path / "saved", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, restored.params, model.params)


def test_axes_that_do_not_divide_are_replicated():
    config, _, _ = golden("llama-mqa")
    mesh = jax.make_mesh((2,), ("model",))
    shape = (2, config["hidden_size"], 1, 16)  # one key/value head
    sharding = param_sharding("layers.attention.k_proj.kernel", shape, mesh)
    assert sharding.is_fully_replicated


def test_a_mesh_without_the_axis_is_explained():
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match=r"needs an axis 'model'.*it has \('data',\)"):
        param_sharding("lm_head.kernel", (4, 4), mesh)


def test_every_large_parameter_has_a_split(tmp_path):
    config, tensors, _ = golden("llama-bias")
    model = load_model(write_hf(tmp_path, config, tensors))
    mesh = jax.make_mesh((2,), ("model",))
    for path, leaf in flatten_paths(abstract_params(model.config, jnp.float32)).items():
        if path.endswith(("kernel", "embedding")):
            assert not param_sharding(path, leaf.shape, mesh).is_fully_replicated, path


def test_a_directory_is_never_overwritten(tmp_path):
    model, directory, _ = saved(tmp_path, "llama-gqa")
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        save_checkpoint(
            directory, config=model.config, params=model.params, tokenizer=model.tokenizer
        )


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format=99), "of format 99, expected 1"),
        (lambda values: values["config"].pop("num_heads"), "does not describe a decoder"),
        (
            lambda values: values["config"].update(num_layers=3),
            r"does not hold the parameters.*layers\.attention\.k_proj\.kernel: expected \(3, .*"
            r"layers\.mlp\.up_proj\.kernel: expected \(3, ",
        ),
    ],
    ids=["newer-format", "missing-field", "other-shape"],
)
def test_damaged_checkpoints_are_explained(tmp_path, change, message):
    _, directory, _ = saved(tmp_path, "llama-gqa")
    edit(directory / "decoder.json", change)
    with pytest.raises(LoadError, match=message):
        load_model(directory, dtype=jnp.float32)


def test_a_checkpoint_without_arrays_is_explained(tmp_path):
    _, directory, _ = saved(tmp_path, "llama-gqa")
    shutil.rmtree(directory / "params")
    with pytest.raises(LoadError, match="no saved arrays there"):
        load_model(directory, dtype=jnp.float32)
