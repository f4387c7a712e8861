"""The attention recommended for a model: what a search found for it, or else the hybrid."""

import re

from minference_jax.adaptive import AdaptiveAttention, BlockThreshold, WithColumns
from minference_jax.attention import SparseAttention
from minference_jax.configs import load_shipped
from minference_jax.files import attention_size

# The one place with these numbers: the command line, its help and its records take them from here.
ALPHA, NUM_COLUMNS = 0.1, 512
RECOMMENDED = WithColumns(BlockThreshold(ALPHA), NUM_COLUMNS)

# Models whose searched thresholds kept more than the hybrid did at the length of their search
# (`configs/README.md`), as `_plain` writes their names. Others of the same shape, such as further
# tuned ones, may have other heads.
_SEARCHED = {
    "qwen2.5-coder-0.5b-instruct": "qwen2.5-coder-0.5b-thresholds",
    "qwen2.5-coder-1.5b-instruct": "qwen2.5-coder-1.5b-thresholds",
    "smollm2-135m-instruct": "smollm2-135m-thresholds",
    "smollm2-135m-8k-lc100k-mix1-ep2": "smollm2-135m-thresholds",  # so in its authors' files
}
# What is added to a name where the weights are the same but for rounding.
_SAME_WEIGHTS = r"([-.](gguf|awq|gptq|(int|fp)\d+|b?f\d+|i?q\d[a-z0-9-]*))+$"


def recommended_attention(
    num_layers: int, num_heads: int | None = None, name: str | None = None
) -> SparseAttention | AdaptiveAttention:
    """The attention recommended for a model: searched thresholds, or thresholds and 512 columns.

    The latter needs no search and no pattern file. `recommended_patterns` says which it is.

    Args:
        num_layers: layers of the model; 1 and `.layer(0)` for a single layer.
        num_heads: query heads of a layer.
        name: of the model, if what is shipped for it shall be used.
    """
    patterns = recommended_patterns(num_layers, num_heads, name)
    if patterns is not None:
        return load_shipped(patterns)
    return AdaptiveAttention(RECOMMENDED).for_layers(num_layers)


def recommended_patterns(
    num_layers: int, num_heads: int | None = None, name: str | None = None
) -> str | None:
    """Which of `shipped_patterns()` is recommended for a model, if one is.

    Args:
        num_layers: layers of the model.
        num_heads: query heads of a layer.
        name: of the model, with or without organisation and quantisation, in any spelling:
            `Qwen/Qwen2.5-Coder-1.5B-Instruct` and `qwen2.5 coder 1.5b instruct GGUF` are the same.

    Returns:
        The file's name, None if none is known for a model of this name and size.
    """
    patterns = _SEARCHED.get(_plain(name or ""))
    if patterns is None or attention_size(load_shipped(patterns)) != (num_layers, num_heads):
        return None
    return patterns


def _plain(name: str) -> str:
    name = re.sub(r"[^a-z0-9.]+", "-", name.rpartition("/")[2].lower())
    return re.sub(_SAME_WEIGHTS, "", name)
