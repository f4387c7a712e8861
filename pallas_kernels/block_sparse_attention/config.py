"""Tile sizes and pipeline depth of the Hopper kernel."""

import dataclasses

from pallas_kernels.common.tiling import round_up

# Query rows of one warpgroup (the M of wgmma), and warpgroups that compute.
ROWS = 64
COMPUTE_WARPGROUPS = 2
BLOCK_Q = ROWS * COMPUTE_WARPGROUPS

# Shared memory of one block on compute capability 9.0, less what barriers and alignment take.
_SHARED_MEMORY = 232_448 - 2_048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs; the index alone decides what it computes.

    Attributes:
        stages: key/value tiles in flight.
        queries_in_registers: feed the queries of the score product from registers, which halves
            what the tensor cores read from shared memory.
    """

    stages: int
    queries_in_registers: bool = False

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"`stages` must be at least 2, got {self.stages}")


def shared_memory(head_dim: int, stage_rows: int, stages: int) -> int:
    """Bytes of shared memory of one block (16-bit elements)."""
    row = 2 * head_dim
    queries = BLOCK_Q * row
    return queries + 2 * stages * stage_rows * row + round_up(BLOCK_Q * 4, 1024)


def default_config(head_dim: int, stage_rows: int) -> Config | None:
    """The measured best for these shapes (README.md), None where two stages do not fit."""
    for stages in (4, 3, 2):
        if shared_memory(head_dim, stage_rows, stages) <= _SHARED_MEMORY:
            return Config(stages=stages, queries_in_registers=head_dim <= 128)
    return None
