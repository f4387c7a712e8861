"""Tile sizes and pipeline depth of the Hopper kernel."""

import dataclasses

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
        k_stages: tiles of keys in flight.
        v_stages: tiles of values in flight. An item's values are used one item later than its
            keys, so one more stage of values than of keys keeps both as far ahead.
        queries_in_registers: feed the queries of the score product from registers, which halves
            what the tensor cores read from shared memory and leaves its room to the stages.
    """

    k_stages: int
    v_stages: int
    queries_in_registers: bool

    def __post_init__(self):
        if min(self.k_stages, self.v_stages) < 2:
            raise ValueError(
                "`k_stages` and `v_stages` must be at least 2, got "
                f"{self.k_stages} and {self.v_stages}"
            )


def shared_memory(head_dim: int, stage_rows: int, config: Config) -> int:
    """Bytes of shared memory of one block (16-bit elements)."""
    stages = config.k_stages + config.v_stages
    queries = 0 if config.queries_in_registers else BLOCK_Q
    return (stages * stage_rows + queries) * 2 * head_dim


def default_config(head_dim: int, stage_rows: int) -> Config | None:
    """The measured best for these shapes (README.md), None where two stages do not fit."""
    for k_stages, v_stages in ((2, 3), (2, 2)):
        config = Config(k_stages=k_stages, v_stages=v_stages, queries_in_registers=head_dim <= 128)
        if shared_memory(head_dim, stage_rows, config) <= _SHARED_MEMORY:
            return config
    return None
