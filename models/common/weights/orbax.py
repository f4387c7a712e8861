"""Orbax checkpoints: convert a model once, restore it fast and spread over devices."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from models.common import config as configs
from models.common.checks import check_split
from models.common.config import DecoderConfig, RopeConfig
from models.common.decoder import abstract_params
from models.common.tokenizer import Tokenizer, load_tokenizer, read_json
from models.common.weights.errors import LoadError, summarise_names
from models.common.weights.sharding import MODEL_AXIS, placed
from models.common.weights.table import flatten_paths, unflatten_paths

CHECKPOINT_CONFIG = "decoder.json"
_PARAMS = "params"
_FORMAT = 1
_SCALINGS = {
    kind.__name__: kind
    for kind in (
        configs.LinearScaling,
        configs.DynamicNTKScaling,
        configs.Llama3Scaling,
        configs.YarnScaling,
        configs.LongRopeScaling,
    )
}


def save_checkpoint(
    directory: str | Path, *, config: DecoderConfig, params: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes a model that `load_model` restores, shard by shard where the parameters are sharded.

    On several hosts all of them call it, with a directory that all of them see.

    Args:
        directory: created if absent; must not hold a checkpoint yet.
        config: the model's hyper-parameters.
        params: its parameters.
        tokenizer: its tokenizer.

    Raises:
        FileExistsError: the directory holds a checkpoint already.
    """
    directory = Path(directory).expanduser().absolute()
    if (directory / CHECKPOINT_CONFIG).exists() or (directory / _PARAMS).exists():
        raise FileExistsError(f"`{directory}` already holds a checkpoint; choose another directory")
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _PARAMS, params)
    if jax.process_index() > 0:
        return
    tokenizer.save(directory)
    values = {
        "format": _FORMAT,
        "dtype": jnp.dtype(jax.tree.leaves(params)[0].dtype).name,
        "config": _to_json(config),
        "files": _file_sizes(directory / _PARAMS),
    }
    text = json.dumps(values, indent=2)
    # Written last: a directory that has it is complete.
    (directory / CHECKPOINT_CONFIG).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(
    directory: Path, *, dtype: Any, mesh: Mesh | None, tokenizer: Path | None = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer]:
    """Restores what `save_checkpoint` wrote; each device reads only its own shards.

    Args:
        directory: the checkpoint.
        dtype: of the restored parameters; converted while reading.
        mesh: devices to spread the parameters over, one device if None.
        tokenizer: a directory to take the tokenizer from instead.

    Raises:
        LoadError: files are missing, damaged or of a newer format.
    """
    directory = directory.absolute()
    config = read_config(directory)
    words = load_tokenizer(tokenizer or directory)
    if mesh is not None:
        check_split(config, mesh.shape.get(MODEL_AXIS, 1))
    _check_files(directory)
    leaves = flatten_paths(abstract_params(config, dtype))
    target = unflatten_paths({path: placed(path, leaf, mesh) for path, leaf in leaves.items()})
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Before the restore: one that fails half-way leaves reads of other arrays running.
            _check_shapes(checkpointer.metadata(directory / _PARAMS), leaves)
            params = checkpointer.restore(directory / _PARAMS, target)
    except (ValueError, KeyError, FileNotFoundError, OSError) as error:
        raise LoadError(
            f"`{directory / _PARAMS}` does not hold the parameters that `{CHECKPOINT_CONFIG}` "
            f"describes ({error}); save the checkpoint again"
        ) from error
    return config, params, words


def _file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _check_files(directory: Path) -> None:
    """Raises LoadError that names every file of the saved arrays that is lost or cut off."""
    found = _file_sizes(directory / _PARAMS)
    saved = read_json(directory / CHECKPOINT_CONFIG).get("files", {})
    bad = [name for name, size in saved.items() if found.get(name) != size]
    if found and bad:
        raise LoadError(
            f"`{directory / _PARAMS}` is incomplete: {', '.join(summarise_names(bad))} "
            f"({len(bad)} of {len(saved)} files) lost or of another size than when saved; copy the "
            "checkpoint again, or save it again"
        )


def _check_shapes(metadata: Any, expected: dict[str, Any]) -> None:
    """Raises ValueError that lists every parameter that is missing, unknown or of another shape."""
    if metadata.item_metadata is None:
        raise ValueError("no saved arrays there")
    saved = {path: leaf.shape for path, leaf in flatten_paths(metadata.item_metadata.tree).items()}
    wanted = {path: leaf.shape for path, leaf in expected.items()}
    wrong = [
        f"{path}: expected {wanted.get(path, 'nothing')}, saved {saved.get(path, 'nothing')}"
        for path in sorted(saved | wanted)
        if saved.get(path) != wanted.get(path)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _to_json(config: DecoderConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    if config.rope.scaling is not None:
        values["rope"]["scaling"]["kind"] = type(config.rope.scaling).__name__
    return values


def read_config(directory: Path) -> DecoderConfig:
    """The configuration of a checkpoint; raises LoadError if it is damaged or of a newer format."""
    path = directory / CHECKPOINT_CONFIG
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise LoadError(
            f"`{path}` is of format {values.get('format')!r}, expected {_FORMAT}; save the "
            "checkpoint again with this version"
        )
    try:
        fields = dict(values["config"])
        rope: dict[str, Any] = dict(fields.pop("rope"))
        scaling = rope.pop("scaling")
        if scaling is not None:
            scaling = _scaling(**scaling)
        return DecoderConfig(rope=RopeConfig(scaling=scaling, **rope), **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"`{path}` does not describe a decoder ({error}); save it again") from error


def _scaling(kind: str, **fields: Any) -> configs.RopeScaling:
    scaling: Any = _SCALINGS[kind]
    return scaling(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )
