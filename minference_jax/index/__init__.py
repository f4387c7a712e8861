"""Online estimation: from queries, keys and a layer's patterns to the sparse index."""

from minference_jax.index.build import build_index as build_index
from minference_jax.index.dense import dense_index as dense_index
