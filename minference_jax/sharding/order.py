"""In which order a prompt lies on the devices that share it.

Under causal attention late queries see more keys than early ones. So a prompt for `parts` devices
is cut into 2 * parts chunks, and device i holds chunks i and 2 * parts - 1 - i (zigzag): all see as
many keys. A model puts its tokens into this order once; attention then moves no queries.
"""

import numpy as np

from pallas_kernels.common.tiling import round_up


def padded_length(length: int, parts: int, block_q: int = 128) -> int:
    """Rows to pad a prompt to, so that each of its chunks is a whole number of query tiles.

    Args:
        length: tokens of the prompt.
        parts: devices that share it.
        block_q: query rows of a tile, as the attention has it.
    """
    return round_up(length, 2 * parts * block_q)


def balanced_order(length: int, parts: int) -> np.ndarray:
    """The position in the prompt of each stored row: `stored = x[:, order]`.

    Args:
        length: rows, padding included.
        parts: devices that share them; each holds `length / parts` consecutive stored rows.

    Raises:
        ValueError: the rows cannot be cut into 2 * parts chunks.
    """
    if length % (2 * parts):
        raise ValueError(
            f"{length} rows cannot be cut into {2 * parts} chunks; pad them to `padded_length`"
        )
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(-1)


def natural_order(length: int, parts: int) -> np.ndarray:
    """The stored row of each position, the inverse of `balanced_order`: `x = stored[:, order]`."""
    return np.argsort(balanced_order(length, parts))
