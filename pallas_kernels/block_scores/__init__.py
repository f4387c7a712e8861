"""Softmax of query rows over mean keys, summed over the rows of query tiles: see README.md."""

from pallas_kernels.block_scores.api import block_scores as block_scores
