"""The attention recommended where no pattern search was made for a model."""

from minference_jax.adaptive.attention import AdaptiveAttention
from minference_jax.adaptive.block_threshold import BlockThreshold
from minference_jax.adaptive.with_columns import WithColumns

# The one place with these numbers: the command line, its help and its records take them from here.
ALPHA, NUM_COLUMNS = 0.1, 512
RECOMMENDED = WithColumns(BlockThreshold(ALPHA), NUM_COLUMNS)


def recommended_attention(num_layers: int) -> AdaptiveAttention:
    """The adaptive attention recommended for any model: thresholded blocks and 512 columns.

    It needs no search and no pattern file. Where a search was made for the model
    (`minference_jax.search`, `shipped_patterns()`), `load_shipped` gives what it found.

    Args:
        num_layers: layers of the model; 1 and `.layer(0)` for a single layer.
    """
    return AdaptiveAttention(RECOMMENDED).for_layers(num_layers)
