"""Shapes and schedule of the Hopper kernel."""

import dataclasses

from pallas_kernels.common.tiling import round_up

# Shared memory of one block on compute capability 9.0, and what barriers and alignment may take.
_SHARED_MEMORY = 232_448
_RESERVED = 2_048

# Query rows of one warpgroup (wgmma's M), and warpgroups that compute.
ROWS = 64
COMPUTE_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs; the index alone decides what it computes.

    Attributes:
        stages: key/value tiles in flight.
        overlap: run the softmax of one tile beside the value product of the one before, within
            each warpgroup; otherwise the two warpgroups only alternate.
        alternate: let the two warpgroups take turns at the tensor cores.
        group_inner: neighbouring blocks serve the query heads of one key/value head (which share
            its keys in the cache); otherwise neighbouring query tiles of one head.
    """

    stages: int
    overlap: bool = True
    alternate: bool = True
    group_inner: bool = True

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"`stages` must be at least 2, got {self.stages}")


def shared_memory(head_dim: int, block_kv: int, stages: int) -> int:
    """Bytes of shared memory of one block (16-bit elements)."""
    row = 2 * head_dim
    queries = COMPUTE_WARPGROUPS * ROWS * row
    return queries + 2 * stages * block_kv * row + round_up(COMPUTE_WARPGROUPS * ROWS * 4, 1024)


def default_config(head_dim: int, block_kv: int) -> Config | None:
    """The measured best for these shapes, None where not even two stages fit."""
    stages = 4
    while stages >= 2 and shared_memory(head_dim, block_kv, stages) > _SHARED_MEMORY - _RESERVED:
        stages -= 1
    return Config(stages=stages) if stages >= 2 else None
