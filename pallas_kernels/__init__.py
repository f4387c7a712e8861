"""Kernels with their references: attention over lists of tiles and columns, and line scores."""

from pallas_kernels.block_sparse_attention import BlockSparseIndex as BlockSparseIndex
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.line_scores import line_scores as line_scores
