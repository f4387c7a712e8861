"""Shapes of published models, for measurements that need no weights."""

from collections.abc import Callable
from typing import Literal

from models.common.config import DecoderConfig
from models.llama import config as llama

ShapeName = Literal["llama3-8b", "qwen2.5-7b", "smollm2-135m"]
SHAPES: dict[ShapeName, Callable[[], DecoderConfig]] = {
    "llama3-8b": llama.llama3_8b,
    "qwen2.5-7b": lambda: llama.qwen2_5("7B"),
    "smollm2-135m": llama.smollm2_135m,
}
