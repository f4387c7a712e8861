"""Attention over lists of key tiles and key columns: see README.md."""

from pallas_kernels.block_sparse_attention.api import (
    block_sparse_attention as block_sparse_attention,
)
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex as BlockSparseIndex
