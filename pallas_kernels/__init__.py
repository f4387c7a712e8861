"""Kernels with their references: attention over tiles and columns, line scores, block scores."""

from pallas_kernels.block_scores import block_scores as block_scores
from pallas_kernels.block_sparse_attention import BlockSparseIndex as BlockSparseIndex
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.line_scores import line_scores as line_scores
