"""The mesh of a run: its name in a row, what it cannot split, and attention on it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import minference_jax as mj
from experiments.common.devices import DeviceOptions
from experiments.common.errors import UserError
from experiments.common.methods import Method
from minference_jax.sharding import HEADS_AXIS, SEQUENCE_AXIS
from models.common.checks import check_mesh
from models.common.config import DecoderConfig


def mesh_of(options: DeviceOptions) -> Mesh | None:
    """The mesh, None for one device.

    Raises:
        UserError: there are too few devices, or several processes.
    """
    if jax.process_count() > 1:
        raise UserError("ttft times the devices of one process; start it once, on one host")
    mesh = options.build()
    return None if mesh is None or mesh.size == 1 else mesh


def label_of(mesh: Mesh | None) -> str | None:
    """The mesh as a row names it, written in one way only."""
    if mesh is None:
        return None
    sizes = {"tp": mesh.shape[HEADS_AXIS], "cp": mesh.shape[SEQUENCE_AXIS]}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def check_devices(
    methods: Sequence[Method], config: DecoderConfig, mesh: Mesh | None, *, whole: bool
) -> None:
    """Raises UserError where a model or a method cannot be split over the mesh.

    Args:
        methods: what is to run.
        config: of the model; its weights need not be there.
        mesh: of the run, None for one device.
        whole: whether prompts are read whole.
    """
    if mesh is None:
        return
    if not whole and mesh.shape[SEQUENCE_AXIS] > 1:
        raise UserError("--mesh with cp splits whole prompts; leave out --chunk-size, or take tp")
    for method in methods:
        attention = method.attention(config.num_layers, config.num_heads)
        layout = getattr(attention, "layout", None)
        few = config.num_kv_heads < mesh.shape[HEADS_AXIS]
        if few and getattr(layout, "shared", False):
            raise UserError(
                f"{method.label}: query heads that share a list lie on several devices; take at "
                f"most tp={config.num_kv_heads}, the model's KV heads"
            )
        try:
            check_mesh(mj.ShardedAttention(attention, mesh), None, config, whole=whole, what="")
        except ValueError as error:
            raise UserError(f"--mesh, {method.label}: {error}") from error


def spread(attention: Any, mesh: Mesh | None) -> Any:
    """The attention of a model on a mesh, its arrays on all devices."""
    if mesh is None:
        return attention
    sharded = mj.ShardedAttention(attention, mesh)
    return jax.device_put(sharded, NamedSharding(sharded.auto_mesh, PartitionSpec()))
