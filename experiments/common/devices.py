"""The devices of a run: a mesh on one host or several, and the processes that share it."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.options import OptionalText
from minference_jax.sharding import HEADS_AXIS, SEQUENCE_AXIS, attention_mesh
from models import Model
from models.common.checks import check_mesh

_COORDINATOR, _PROCESSES, _NUMBER = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The devices that share the work."""

    mesh: OptionalText = None
    """tp=N splits the model over N devices, cp=N the prompt; tp=2,cp=4 takes 8. One if not
    given."""

    def __post_init__(self) -> None:
        """Raises UserError for a mesh that is none."""
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        """Devices that share the heads, and those that share a prompt."""
        found = {"tp": 1, "cp": 1}
        for part in () if self.mesh is None else self.mesh.split(","):
            name, _, size = part.partition("=")
            if name not in found or not size.isdecimal() or int(size) < 1:
                raise UserError(f"--mesh must be tp=N, cp=N or tp=N,cp=N, got {self.mesh}")
            found[name] = int(size)
        return found["tp"], found["cp"]

    def build(self) -> Mesh | None:
        """Returns the mesh, None for one device; raises UserError if there are too few devices."""
        heads, sequence = self.sizes
        everywhere = jax.process_count() > 1
        if everywhere and heads * sequence != jax.device_count():
            raise UserError(
                f"--mesh must take the {jax.device_count()} devices of all "
                f"{jax.process_count()} processes, tp times cp is {heads * sequence}"
            )
        if self.mesh is None:
            return None
        with reported_as_user_error(ValueError):
            return attention_mesh(heads=heads, sequence=sequence)

    def imagined(self) -> AbstractMesh | None:
        """The mesh of devices that need not be there, for estimates alone."""
        if self.mesh is None:
            return None
        heads, sequence = self.sizes
        kinds = (AxisType.Auto, AxisType.Auto)
        names = (SEQUENCE_AXIS, HEADS_AXIS)
        return AbstractMesh((sequence, heads), names, axis_types=kinds)


def check_spread(model: Model, attention: Any) -> None:
    """Raises UserError where a model cannot read a whole prompt on its attention's mesh."""
    with reported_as_user_error(ValueError):
        check_mesh(attention, None, model.config, whole=True, what="the prefill")


def join_processes() -> bool:
    """Makes this process one of several where JAX's environment variables say so, and tells.

    With `JAX_COORDINATOR_ADDRESS`; `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` may be left out where
    JAX finds them (SLURM, Open MPI, Kubernetes). Has to come before anything asks for devices.

    Raises:
        UserError: the number of processes or this one's is missing or no number.
    """
    if _COORDINATOR not in os.environ:
        return False
    with reported_as_user_error(ValueError, RuntimeError):
        numbers = (int(os.environ[x]) if x in os.environ else None for x in (_PROCESSES, _NUMBER))
        processes, number = numbers
        jax.distributed.initialize(num_processes=processes, process_id=number)
    return True


def is_first() -> bool:
    """Returns whether this process writes and prints, as one of them does."""
    return jax.process_index() == 0


def on_host(x: jax.Array) -> np.ndarray:
    """An array of this or all hosts."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
