"""From a model and a calibration prompt to static indices ("Ours w/ static" in the paper)."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.attention import SparseAttention
from minference_jax.baselines import StaticAttention, StaticLines, static_lines
from models.common.config import DecoderConfig
from models.common.decoder import prefill
from models.common.stack import Params


def static_attention(
    params: Params,
    tokens: Int[Array, "1 s"],
    *,
    config: DecoderConfig,
    sparse: SparseAttention,
) -> StaticAttention:
    """Reads a calibration prompt with a sparse attention and freezes the lines that it takes.

    Every layer reads what the sparse layers before it computed, so that on this prompt the static
    attention equals the sparse one. Memory is that of a prefill.

    Args:
        params: the tree described in `models.common.decoder`.
        tokens: the calibration prompt.
        config: the model's hyper-parameters.
        sparse: the attention of all layers.

    Raises:
        ValueError: there is more than one prompt, or as `prefill`.
    """
    if tokens.shape[0] != 1:
        raise ValueError(f"lines come from one calibration prompt, got {tokens.shape[0]}")
    most = int(np.max([sparse.patterns.slash_size, sparse.patterns.window_size]))
    # A power of two, so that prompts and budgets of about these sizes share a program.
    observe = _ObserveLines(max_distances=1 << max(most - 1, 0).bit_length())
    read = prefill(params, tokens, config=config, attention_fn=sparse, observe=observe)
    return StaticAttention(sparse, cast(StaticLines, read[-1]))


@dataclasses.dataclass(frozen=True)
class _ObserveLines:
    """Attends, and hands out the layer's lines: an `observe` function of `prefill`."""

    max_distances: int

    def __call__(
        self,
        attention: SparseAttention,
        q: Float[Array, "1 s heads head_dim"],
        k: Float[Array, "1 s kv_heads head_dim"],
        v: Float[Array, "1 s kv_heads head_dim"],
        *,
        lengths: Int[Array, " 1"] | None,
        q_offset: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "1 s heads head_dim"], StaticLines]:
        patterns = jax.tree.map(jnp.asarray, attention.patterns)
        lines = static_lines(q, k, patterns, max_distances=self.max_distances, lengths=lengths)
        return attention(q, k, v, lengths=lengths, q_offset=q_offset), lines
