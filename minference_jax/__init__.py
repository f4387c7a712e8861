"""MInference in JAX: patterns, index estimation and sparse attention for long-context prefill."""

from minference_jax.attention import DenseAttention as DenseAttention
from minference_jax.attention import SparseAttention as SparseAttention
from minference_jax.attention import VisitedPairs as VisitedPairs
from minference_jax.attention import observe_density as observe_density
from minference_jax.attention import vertical_slash_attention as vertical_slash_attention
from minference_jax.index import build_index as build_index
from minference_jax.patterns import AShape as AShape
from minference_jax.patterns import BlockSparse as BlockSparse
from minference_jax.patterns import Dense as Dense
from minference_jax.patterns import HeadPatterns as HeadPatterns
from minference_jax.patterns import Kind as Kind
from minference_jax.patterns import Pattern as Pattern
from minference_jax.patterns import TriShape as TriShape
from minference_jax.patterns import VerticalSlash as VerticalSlash
from minference_jax.search import search_patterns as search_patterns
from minference_jax.types import AttentionFn as AttentionFn
