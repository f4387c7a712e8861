"""`load_model`: one call from a file, a directory or a hub id to a model that runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.common.checks import check_split
from models.common.config import DecoderConfig, RopeScaling
from models.common.decoder import abstract_params
from models.common.tokenizer import Tokenizer, load_tokenizer, read_json
from models.common.tokenizer_gguf import tokenizer_from_gguf
from models.common.weights import hub
from models.common.weights.errors import LoadError
from models.common.weights.gguf import GGUFFile
from models.common.weights.orbax import CHECKPOINT_CONFIG, load_checkpoint, read_config
from models.common.weights.rope_scaling import scaling_from_mapping
from models.common.weights.safetensors import SafetensorsDirectory
from models.common.weights.sharding import MODEL_AXIS, placed
from models.common.weights.table import Naming, TensorSource, flatten_paths, load_params
from models.glm import convert as glm
from models.llama import convert as llama
from models.model import Model

OnTensor = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source whose configuration is known and whose weights are not read yet."""

    config: DecoderConfig
    naming: Naming
    tensors: TensorSource
    tokenizer: Callable[[], Tokenizer]
    name: str | None = None


def load_model(
    source: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    tokenizer: str | Path | None = None,
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None,
    max_position: int | None = None,
    on_tensor: OnTensor | None = None,
) -> Model:
    """Loads configuration, weights and tokenizer.

    To go beyond the context that a model was made for, pass `rope_scaling` as its authors
    recommend, for Qwen2.5 `{"rope_type": "yarn", "factor": 4.0}`; `max_position` then grows by the
    factor unless it is given, too.

    Args:
        source: a `.gguf` file, a Hugging Face directory, a directory made by `save_checkpoint`, or
            the id `organisation/name` of a model on the hub.
        dtype: of the parameters and the computation; float32 or bfloat16 (float16 works, too).
        mesh: devices to spread the parameters over, along its axis "model" (`attention_mesh`); one
            device if None. Nowhere but on the host does a split parameter exist as a whole.
        tokenizer: a directory whose `tokenizer.json` replaces the source's own tokenizer.
        rope_scaling: replaces the source's; a config dataclass, or what `config.json` holds.
        max_position: replaces the source's context length, in tokens.
        on_tensor: called with (tensors read, tensors in all), for a progress bar.

    Returns:
        The model, parameters on the device(s).

    Raises:
        LoadError: the source is missing, damaged, of an unsupported kind or incomplete. Everything
            that does not fit is listed at once, before any weight is read.
        ValueError: the devices of the mesh cannot share the model evenly.
    """
    path, name = _located(source)
    own_tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
    if (path / CHECKPOINT_CONFIG).is_file():
        config, params, words = load_checkpoint(
            path, dtype=dtype, mesh=mesh, tokenizer=own_tokenizer
        )
        config = _extended(config, rope_scaling, max_position)
        return Model(config=config, params=params, tokenizer=words, name=name)
    opened = _open(path)
    words = opened.tokenizer() if own_tokenizer is None else load_tokenizer(own_tokenizer)
    target = abstract_params(opened.config, dtype)
    if mesh is not None:
        check_split(opened.config, mesh.shape.get(MODEL_AXIS, 1))
    shardings = {
        path: placed(path, leaf, mesh).sharding for path, leaf in flatten_paths(target).items()
    }

    def place(path: str, buffer: np.ndarray) -> jax.Array:
        if mesh is None:
            return jax.device_put(buffer, shardings[path])
        # Each device is given its part alone; the mesh may have devices of other hosts.
        return jax.make_array_from_callback(
            buffer.shape, shardings[path], lambda index: buffer[index]
        )

    params = load_params(opened.tensors, opened.naming, target, place=place, on_tensor=on_tensor)
    config = _extended(opened.config, rope_scaling, max_position)
    return Model(config=config, params=params, tokenizer=words, name=opened.name or name)


def abstract_model(
    source: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    tokenizer: str | Path | None = None,
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None,
    max_position: int | None = None,
) -> Model:
    """What `load_model` would return for these arguments, its parameters as shapes only.

    Nothing goes onto a device: for estimates of memory, and to count a prompt's tokens.

    Raises:
        LoadError: the source is missing, its configuration or its tokenizer damaged or unsupported.
    """
    path, name = _located(source)
    own_tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
    if (path / CHECKPOINT_CONFIG).is_file():
        config, words = read_config(path), load_tokenizer(own_tokenizer or path)
    else:
        opened = _open(path)
        config, name = opened.config, opened.name or name
        words = opened.tokenizer() if own_tokenizer is None else load_tokenizer(own_tokenizer)
    params = abstract_params(config, dtype)
    config = _extended(config, rope_scaling, max_position)
    return Model(config=config, params=params, tokenizer=words, name=name)


def _located(source: str | Path) -> tuple[Path, str]:
    """Where a source lies, downloaded if need be, and what it is called there."""
    path = Path(source).expanduser()
    if not path.exists() and hub.is_hub_id(str(source)):
        return hub.download(str(source)), str(source)
    return path, path.absolute().name


def _open(path: Path) -> _Opened:
    if path.is_file():
        return _open_gguf(path)
    if not path.exists():
        raise LoadError(
            f"`{path}` does not exist: pass a `.gguf` file, a model directory, or a hub id "
            "`organisation/name`"
        )
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:10]) or "nothing"
        raise LoadError(
            f"`{path}` is no model directory: it has neither `config.json` (Hugging Face) nor "
            f"`{CHECKPOINT_CONFIG}` (saved by `save_checkpoint`), but {found}"
        )
    return _open_hf(path)


def _open_hf(directory: Path) -> _Opened:
    values = read_json(directory / "config.json")
    kind = values.get("model_type")
    if kind in llama.HF_MODEL_TYPES:
        config = llama.config_from_hf(values)
        naming = llama.hf_naming(config)
    elif kind in glm.HF_MODEL_TYPES:
        config = glm.config_from_hf(values)
        naming = glm.hf_naming(config, kind)
    else:
        raise _unsupported(
            directory, "`model_type`", kind, llama.HF_MODEL_TYPES, glm.HF_MODEL_TYPES
        )
    return _Opened(
        config, naming, SafetensorsDirectory(directory), lambda: load_tokenizer(directory)
    )


def _open_gguf(path: Path) -> _Opened:
    file = GGUFFile(path)
    kind = file.metadata.get("general.architecture")
    if kind in llama.GGUF_ARCHITECTURES:
        read_config, naming = llama.config_from_gguf, llama.gguf_naming(kind)
    elif kind in glm.GGUF_ARCHITECTURES:
        read_config, naming = glm.config_from_gguf, glm.gguf_naming()
    else:
        raise _unsupported(
            path, "architecture", kind, llama.GGUF_ARCHITECTURES, glm.GGUF_ARCHITECTURES
        )
    # An absent embedding is reported with everything else that is missing.
    vocab_size = file.shapes.get("token_embd.weight", (1,))[0]
    config = read_config(
        {key: value for key, value in file.metadata.items() if key.startswith(f"{kind}.")},
        frozenset(file.shapes),
        vocab_size=vocab_size,
        rope_factors={
            name: file.read(f"{name}.weight", 0, file.shapes[f"{name}.weight"][0]).tolist()
            for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
            if f"{name}.weight" in file.shapes
        },
    )
    name = str(file.metadata.get("general.name") or path.stem)
    return _Opened(config, naming, file, lambda: tokenizer_from_gguf(file.metadata), name)


def _unsupported(path: Path, what: str, kind: Any, *supported: Sequence[str]) -> LoadError:
    names = ", ".join(name for group in supported for name in group)
    return LoadError(f"`{path}`: {what} {kind!r} is not supported; supported: {names}")


def _extended(
    config: DecoderConfig,
    rope_scaling: RopeScaling | Mapping[str, Any] | None,
    max_position: int | None,
) -> DecoderConfig:
    if rope_scaling is not None:
        if isinstance(rope_scaling, Mapping):
            rope_scaling = scaling_from_mapping(rope_scaling, max_position=config.max_position)
        if max_position is None:
            factor = getattr(rope_scaling, "factor", 1.0)
            original = getattr(rope_scaling, "original_max_position", config.max_position)
            max_position = max(config.max_position, int(factor * original))
        rope = dataclasses.replace(config.rope, scaling=rope_scaling)
        config = dataclasses.replace(config, rope=rope)
    if max_position is not None:
        config = dataclasses.replace(config, max_position=max_position)
    return config
