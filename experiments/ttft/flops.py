"""Operations of a prompt, and what a device could do of them at best."""

import jax
from jaxtyping import Array

from models.common.config import DecoderConfig

# Dense bf16 with fp32 sums, of the vendor's data sheets, without sparsity: FLOP/s.
_PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}


def linear_flops(config: DecoderConfig) -> int:
    """Operations of projections and MLP of one layer for one token: two for each weight."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    attention = config.embed_dim * (2 * heads + 2 * kv_heads)
    return 2 * (attention + 3 * config.embed_dim * config.hidden_dim)


def prompt_flops(config: DecoderConfig, length: int) -> dict[str, float]:
    """Operations of a prompt: of its linear part, and of dense causal attention."""
    heads = config.num_heads * config.head_dim
    return {
        "linear": float(linear_flops(config)) * config.num_layers * length,
        "dense_attention": 2.0 * config.num_layers * heads * length * (length + 1),
    }


def device_peak() -> float | None:
    """The default device's peak in bf16, FLOP/s; None if it is not known."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAKS.items() if name in kind), None)


def plain_matmuls(layer, x: Array) -> list[Array]:
    """The products of one layer's projections and MLP and nothing else: the roof of its rate.

    Args:
        layer: parameters of one layer.
        x: rows [rows, embed_dim], as many as the model computes at once.
    """
    embed = x.shape[1]
    attention, mlp = layer["attention"], layer["mlp"]
    flat = lambda name: attention[name]["kernel"].reshape(embed, -1)
    q, *kv = (x @ flat(name) for name in ("q_proj", "k_proj", "v_proj"))
    out = q @ attention["o_proj"]["kernel"].reshape(-1, embed)
    gate, up = (x @ mlp[name]["kernel"] for name in ("gate_proj", "up_proj"))
    return [*kv, out, up, gate @ mlp["down_proj"]["kernel"]]
