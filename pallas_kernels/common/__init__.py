"""Shared by the operations: tiling, checks, the online softmax step."""
