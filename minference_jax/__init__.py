"""MInference in JAX: patterns, index estimation and sparse attention for long-context prefill."""

from minference_jax.attention import DenseAttention as DenseAttention
from minference_jax.types import AttentionFn as AttentionFn
