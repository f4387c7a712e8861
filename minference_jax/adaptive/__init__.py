"""Patterns that adapt to each prompt and need no search, and indices made elsewhere."""

from minference_jax.adaptive.attention import AdaptiveAttention as AdaptiveAttention
from minference_jax.adaptive.attention import IndexedAttention as IndexedAttention
from minference_jax.adaptive.block_diagonals import BlockDiagonals as BlockDiagonals
from minference_jax.adaptive.block_mass import BlockMass as BlockMass
from minference_jax.adaptive.block_threshold import BlockThreshold as BlockThreshold
from minference_jax.adaptive.flex_prefill import FlexPrefill as FlexPrefill
from minference_jax.adaptive.layout import Estimator as Estimator
from minference_jax.adaptive.layout import Layout as Layout
from minference_jax.adaptive.triangle_mix import triangle_mix as triangle_mix
from minference_jax.adaptive.with_columns import WithColumns as WithColumns
from minference_jax.adaptive.x_attention import XAttention as XAttention
