import pytest

from tests.models.checkpoints import golden, write_hf


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face directory of two layers with four heads, whose words are `t0`, `t1`, …"""
    config, tensors, _ = golden("llama-gqa")
    return str(write_hf(tmp_path_factory.mktemp("model") / "tiny", config, tensors))
