"""The golden cases as models, through the real converters, without directory or tokenizer."""

import functools
import json

import jax.numpy as jnp
import numpy as np

from models.common.decoder import abstract_params
from models.common.weights.table import load_params
from models.glm import convert as glm
from models.llama import convert as llama
from tests.models.checkpoints import GOLDEN


class ArrayTensors:
    def __init__(self, tensors):
        self._tensors = tensors

    @property
    def shapes(self):
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name, start, stop):
        return self._tensors[name][start:stop]


@functools.cache
def golden_model(name):
    """(config, params, case) of one golden file, fp32."""
    case = np.load(GOLDEN / f"{name}.npz")
    values = json.loads(str(case["config.json"]))
    tensors = {key[7:]: case[key] for key in case.files if key.startswith("tensor:")}
    if values["model_type"] in glm.HF_MODEL_TYPES:
        config = glm.config_from_hf(values)
        naming = glm.hf_naming(config, values["model_type"])
    else:
        config = llama.config_from_hf(values)
        naming = llama.hf_naming(config)
    target = abstract_params(config, jnp.float32)
    return config, load_params(ArrayTensors(tensors), naming, target), case
