"""Hyper-parameters of a pre-norm decoder: everything the forward pass reads, and nothing else."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling:
    """The base grows with the sequence once it is longer than `original_max_position`."""

    factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): NTK-by-parts interpolation and an attention temperature."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Phi-3): divisors per frequency, `short` up to the original length, else `long`."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicNTKScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: leading dimensions of each head that rotate (less than head_dim: partial, GLM).
        interleaved: pairs are (2i, 2i+1) (GLM) instead of (i, i + rotary_dim/2) (Llama).
        scaling: how frequencies change beyond the trained length, or None.
    """

    theta: float
    rotary_dim: int
    interleaved: bool
    scaling: RopeScaling | None

    def __post_init__(self) -> None:
        """Raises ValueError when the frequencies cannot be computed."""
        if self.theta <= 1:
            raise ValueError(f"`rope.theta` must be above 1, got {self.theta}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"`rope.rotary_dim` must be even and positive, got {self.rotary_dim}")
        if isinstance(self.scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                found = len(getattr(self.scaling, name))
                if found != self.rotary_dim // 2:
                    raise ValueError(
                        f"`rope.scaling.{name}` must have one divisor for each of the "
                        f"{self.rotary_dim // 2} rotated pairs, got {found}"
                    )
        if isinstance(self.scaling, DynamicNTKScaling) and self.rotary_dim < 4:
            raise ValueError(
                f"dynamic NTK scaling needs `rope.rotary_dim` >= 4, got {self.rotary_dim}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama- or GLM-like decoder.

    Attributes:
        vocab_size: rows of the embedding.
        embed_dim: width of the residual stream.
        hidden_dim: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: width of one head.
        max_position: the context the model was made for, in tokens.
        norm_eps: RMSNorm's epsilon.
        rope: rotary embedding.
        qkv_bias: biases on the q, k and v projections.
        o_bias: bias on the attention output projection.
        mlp_bias: biases in the MLP.
        tie_embeddings: the LM head is the embedding's transpose.
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError when sizes do not fit together."""
        positive = (
            "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "max_position",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_heads` ({self.num_heads}) must be a multiple of `num_kv_heads` "
                f"({self.num_kv_heads}); check the checkpoint's configuration"
            )
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"`rope.rotary_dim` ({self.rope.rotary_dim}) must not exceed `head_dim` "
                f"({self.head_dim})"
            )
