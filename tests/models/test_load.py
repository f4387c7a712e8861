"""`load_model` from Hugging Face directories: outputs as in transformers, bad input explained."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.attention import DenseAttention
from models import LoadError, load_model
from models.common.config import YarnScaling
from models.common.decoder import forward
from tests.models.checkpoints import CASES, golden, words, write_hf

DENSE = DenseAttention()


def logits_of(model, tokens):
    return forward(model.params, jnp.asarray(tokens), config=model.config, attention_fn=DENSE)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tmp_path, name):
    config, tensors, case = golden(name)
    shards = 3 if len(name) % 2 else 1
    model = load_model(write_hf(tmp_path, config, tensors, shards=shards), dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


def test_generated_text_equals_transformers(tmp_path):
    config, tensors, case = golden("chatglm")
    model = load_model(write_hf(tmp_path, config, tensors), dtype=jnp.float32)
    stops = config["eos_token_id"]
    assert model.tokenizer.stop_tokens == tuple(stops if isinstance(stops, list) else [stops])
    texts = model.generate(
        [words(row) for row in case["tokens"]],
        attention_fn=DENSE,
        max_new_tokens=case["greedy"].shape[1],
    )
    for text, row in zip(texts, case["greedy"], strict=True):
        ends = [i for i, token in enumerate(row) if token in model.tokenizer.stop_tokens]
        expected = words(row[: ends[0]] if ends else row)
        assert text.split()[: len(expected.split())] == expected.split()
        assert ends or text == expected


def test_one_prompt_gives_one_text(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    model = load_model(write_hf(tmp_path, config, tensors), dtype=jnp.float32)
    text = model.generate("t5 t6", attention_fn=DENSE, max_new_tokens=3)
    assert isinstance(text, str)
    assert [text] == model.generate(["t5 t6"], attention_fn=DENSE, max_new_tokens=3)


def test_prefill_takes_a_plain_list(tmp_path):
    config, tensors, case = golden("qwen2")
    model = load_model(write_hf(tmp_path, config, tensors), dtype=jnp.float32)
    logits, cache = model.prefill(case["tokens"][0].tolist(), attention_fn=DENSE)
    np.testing.assert_allclose(logits[0], case["logits"][0, -1], atol=1e-4)
    assert cache.lengths.tolist() == [case["tokens"].shape[1]]


def test_dtype_is_that_of_every_parameter(tmp_path):
    config, tensors, _ = golden("qwen2")
    model = load_model(write_hf(tmp_path, config, tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_files_are_read(tmp_path):
    config, tensors, case = golden("llama-gqa")  # the golden weights are bfloat16 values
    halved = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    model = load_model(write_hf(tmp_path, config, halved), dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


def test_progress_counts_every_tensor(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    seen = []
    load_model(
        write_hf(tmp_path, config, tensors),
        on_tensor=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, len(tensors)) for i in range(len(tensors))]


def test_parameters_spread_over_a_mesh(tmp_path):
    config, tensors, case = golden("llama-mqa")
    mesh = jax.make_mesh((2,), ("model",))
    model = load_model(write_hf(tmp_path, config, tensors), dtype=jnp.float32, mesh=mesh)
    attention = model.params["layers"]["attention"]
    assert attention["q_proj"]["kernel"].sharding.shard_shape((2, 32, 4, 16)) == (2, 32, 2, 16)
    assert attention["k_proj"]["kernel"].sharding.is_fully_replicated  # one head, two devices
    np.testing.assert_allclose(logits_of(model, case["tokens"]), case["logits"], atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        pytest.param({"rope_type": "yarn", "factor": 4.0}, id="as-in-config-json"),
        pytest.param(
            YarnScaling(
                factor=4.0,
                original_max_position=128,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=1.1386294361119891,
                truncate=True,
            ),
            id="dataclass",
        ),
    ],
)
def test_a_context_can_be_extended(tmp_path, scaling):
    config, tensors, _ = golden("qwen2")
    directory = write_hf(tmp_path, config, tensors)
    long = [5] * 200
    model = load_model(directory, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"200 tokens.*context of 128.*extend"):
        model.prefill(long, attention_fn=DENSE)
    extended = load_model(directory, dtype=jnp.float32, rope_scaling=scaling)
    assert extended.config.max_position == 512
    direct = write_hf(
        tmp_path / "direct",
        {**config, "max_position_embeddings": 512, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        }},
        tensors,
    )  # fmt: skip
    assert extended.config == load_model(direct).config
    extended.prefill(long, attention_fn=DENSE)


def test_empty_prompts_are_refused(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    model = load_model(write_hf(tmp_path, config, tensors))
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate("", attention_fn=DENSE)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.prefill([], attention_fn=DENSE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.gguf", "does not exist: pass a `.gguf` file, a model directory, or a hub id"),
        ("some/deep/folder", "does not exist"),
        ("models/nowhere.gguf", "does not exist"),
    ],
)
def test_missing_sources_are_explained(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=re.escape(message)):
        load_model(source)


def test_a_folder_that_is_no_model_is_explained(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(LoadError, match=r"neither `config.json`.*but notes.txt"):
        load_model(tmp_path)


def test_unsupported_architectures_name_the_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(
        LoadError, match=r"'gemma2' is not supported.*llama, mistral, qwen2, phi3, glm, chatglm"
    ):
        load_model(tmp_path)


def test_a_missing_tokenizer_is_explained_and_can_be_given(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    directory = write_hf(tmp_path / "model", config, tensors)
    other = tmp_path / "tokenizer"
    other.mkdir()
    (directory / "tokenizer.json").rename(other / "tokenizer.json")
    with pytest.raises(LoadError, match=r"has no `tokenizer.json`.*`tokenizer=`"):
        load_model(directory)
    assert load_model(directory, tokenizer=other).tokenizer.encode("t7") == [7]


def test_heads_that_do_not_divide_are_refused(tmp_path):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path, {**config, "num_key_value_heads": 3}, tensors)
    with pytest.raises(LoadError, match="4 query heads are not a multiple of 3 key/value heads"):
        load_model(tmp_path)


def test_a_damaged_config_is_explained(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(LoadError, match=r"config.json` is not valid JSON"):
        load_model(tmp_path)


def test_an_unreachable_hub_is_explained(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(LoadError, match=r"not a path here.*ConnectionError.*pass its directory"):
        load_model("organisation/name")


def test_hub_ids_load_what_was_fetched(monkeypatch, tmp_path):
    config, tensors, _ = golden("llama-gqa")
    directory = write_hf(tmp_path / "snapshot", config, tensors)
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repository, **kwargs: asked.append((repository, kwargs)) or str(directory),
    )
    model = load_model("organisation/name")
    assert (model.config.num_layers, model.name) == (2, "organisation/name")
    assert load_model("snapshot").name == "snapshot"
    assert asked[0][0] == "organisation/name"
    assert not any("bin" in pattern for pattern in asked[0][1]["allow_patterns"])
