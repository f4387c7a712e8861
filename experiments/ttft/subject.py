"""What is measured: a model with its weights and a text, or a shape with random ones."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int
from rich.console import Console

from experiments.common.measure import stage
from experiments.common.options import LoadOptions
from experiments.common.prompts import CHAPTER, packaged_chapter, read_book
from experiments.common.session import check_fits, load
from experiments.common.shapes import SHAPES, ShapeName
from models import Model
from models.common.config import DecoderConfig
from models.common.decoder import abstract_params, init_params
from models.common.weights.sharding import param_sharding
from models.common.weights.table import flatten_paths, unflatten_paths


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model to be timed.

    Attributes:
        name: of the model or the shape.
        config: hyper-parameters.
        params: weights, on the device or spread over those of a mesh.
        tokens: the prompt of a length [1, length].
        text: names of the texts, or that tokens are random.
        distinct: tokens that the texts have; longer prompts repeat them.
        model: the loaded model; None for a shape.
    """

    name: str
    config: DecoderConfig
    params: Any
    tokens: Callable[[int], Int[Array, "1 s"]]
    text: str
    distinct: int | None
    model: Model | None


def of_shape(
    name: ShapeName,
    *,
    dtype: jnp.dtype,
    longest: int,
    seed: int,
    console: Console,
    mesh: Mesh | None = None,
) -> Subject:
    """A shape with random weights, made on the device; its context is the longest length.

    On a mesh each device makes its part, which has the values of the same weights on one device.
    """
    config = SHAPES[name]()
    # Weights that were never trained have no context that could be too short.
    config = dataclasses.replace(config, max_position=max(longest, config.max_position))
    params_key, tokens_key = jax.random.split(jax.random.key(seed))
    with stage(console, f"random weights of {name}"):
        where = None if mesh is None else _shardings(config, dtype, mesh)
        make = jax.jit(init_params, static_argnums=(0, 2), out_shardings=where)
        params = jax.block_until_ready(make(config, params_key, dtype))

    def tokens(length: int) -> Array:
        return jax.random.randint(tokens_key, (1, length), 0, config.vocab_size, jnp.int32)

    return Subject(
        name=name, config=config, params=params, tokens=tokens, text="random tokens",
        distinct=None, model=None,
    )  # fmt: skip


def of_model(
    options: LoadOptions,
    texts: Sequence[Path],
    *,
    longest: int,
    console: Console,
    mesh: Mesh | None = None,
) -> Subject:
    """A model and the beginning of its texts, one after the other, from the start if too short.

    Raises:
        UserError: the model or a text cannot be read, or the longest prompt exceeds the context.
    """
    books = [read_book(path) for path in texts] if texts else [packaged_chapter()]
    model = load(options, console, mesh)
    check_fits(longest, model)
    with stage(console, "tokens of the text"):
        ids: list[int] = []
        for number, book in enumerate(books):
            if len(ids) < longest:
                ids += model.tokenizer.encode(book, add_special_tokens=number == 0)
    if len(ids) < longest:
        console.print(
            f"the texts have {len(ids):,} tokens: longer prompts repeat them (--texts names more)",
            highlight=False,
        )
    names = ", ".join(path.name for path in texts) or CHAPTER
    return Subject(
        name=model.name or Path(options.model).stem, config=model.config, params=model.params,
        tokens=functools.partial(_repeated, np.asarray(ids, np.int32)), text=names,
        distinct=len(ids), model=model,
    )  # fmt: skip


def first_layers(tree: Any, number: int) -> Any:
    """The first layers of a tree whose arrays have a leading [layers] axis."""
    return jax.tree.map(lambda leaf: leaf[:number], tree)


def shortened(subject: Subject, number: int) -> Subject:
    """The same model with its first layers only."""
    if number == subject.config.num_layers:
        return subject
    return dataclasses.replace(
        subject,
        config=dataclasses.replace(subject.config, num_layers=number),
        params={**subject.params, "layers": first_layers(subject.params["layers"], number)},
    )


def _shardings(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh) -> Any:
    leaves = flatten_paths(abstract_params(config, dtype))
    place = lambda path, leaf: param_sharding(path, leaf.shape, mesh)
    return unflatten_paths({path: place(path, leaf) for path, leaf in leaves.items()})


def _repeated(ids: np.ndarray, length: int) -> Array:
    return jnp.asarray(np.resize(ids, (1, length)))
