"""Where each parameter lives on a mesh of devices."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.common.weights.table import flatten_paths, unflatten_paths

MODEL_AXIS = "model"
# The axis of each parameter that is split, counted from the end: attention heads, the MLP's width,
# the vocabulary. The matching pairs (q, k, v with o; gate, up with down) need one all-reduce.
_SPLIT = {
    "embed.embedding": -2,
    "layers.attention.q_proj.kernel": -2,
    "layers.attention.k_proj.kernel": -2,
    "layers.attention.v_proj.kernel": -2,
    "layers.attention.q_proj.bias": -2,
    "layers.attention.k_proj.bias": -2,
    "layers.attention.v_proj.bias": -2,
    "layers.attention.o_proj.kernel": -3,
    "layers.mlp.gate_proj.kernel": -1,
    "layers.mlp.up_proj.kernel": -1,
    "layers.mlp.gate_proj.bias": -1,
    "layers.mlp.up_proj.bias": -1,
    "layers.mlp.down_proj.kernel": -2,
    "lm_head.kernel": -1,
}


def split_axis(path: str, shape: Sequence[int], devices: int) -> int | None:
    """The axis of a parameter, from the end, that so many devices share; None if all have all."""
    axis = _SPLIT.get(path)
    return None if axis is None or shape[axis] % devices else axis


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of one parameter.

    Args:
        path: its dotted path in the tree.
        shape: its shape.
        mesh: devices; the axis named "model" splits heads, MLP width and vocabulary.

    Returns:
        The sharding; replicated for small parameters and where the axis does not divide evenly: few
        key/value heads on many devices (`checks.check_split` refuses the rest).

    Raises:
        ValueError: the mesh has no axis "model".
    """
    if MODEL_AXIS not in mesh.shape:
        raise ValueError(
            f"the mesh needs an axis {MODEL_AXIS!r} to place parameters on, it has "
            f"{tuple(mesh.shape)}: `jax.make_mesh((jax.device_count(),), ({MODEL_AXIS!r},))`"
        )
    spec: list[str | None] = [None] * len(shape)
    axis = split_axis(path, shape, mesh.shape[MODEL_AXIS])
    if axis is not None:
        spec[axis] = MODEL_AXIS
    # Automatic axes, whatever kind the caller's are: the compiler places what the model computes.
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*spec))


def shard_params(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Spreads a model's parameters over the axis "model" of a mesh; see `param_sharding`.

    `load_model(…, mesh=mesh)` reads them like this at once, without a copy on one device.

    Raises:
        ValueError: the mesh has no axis "model".
    """
    leaves = flatten_paths(params)
    shardings = {path: param_sharding(path, leaf.shape, mesh) for path, leaf in leaves.items()}
    return unflatten_paths(
        {path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()}
    )


def placed(path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """The abstract parameter with its sharding: on the default device without a mesh."""
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        sharding = param_sharding(path, leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
