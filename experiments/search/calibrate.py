"""From a model and prompts to every candidate's scores in every layer, one file for each layer."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

import minference_jax as mj
from experiments.common.errors import reported_as_user_error
from experiments.common.prompts import QUESTIONS, Task, fit_prompt
from experiments.common.session import check_fits
from experiments.search.options import CalibrationOptions
from experiments.search.space import SpaceOptions
from minference_jax.search import (
    Calibration,
    Calibrations,
    Candidates,
    LayerScores,
    choose,
    fit_budgets,
    for_heads,
    picked,
    score_candidates,
)
from minference_jax.types import AttentionFn
from models import Model
from models.common.capture import embed_prompt, layer_output, layer_qkv, output_gram


def encode_prompts(model: Model, options: CalibrationOptions) -> list[list[int]]:
    """Returns the tokens of the calibration prompts.

    Raises:
        UserError: the model's context, or the text, is too short for them.
    """
    check_fits(options.length, model)
    tokenizer = model.tokenizer

    def encode(text: str, task: Task) -> list[int]:
        if options.chat and task in QUESTIONS and tokenizer.has_chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
            return tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.encode(text)

    def one(task: Task, seed: int) -> list[int]:
        prompt = fit_prompt(
            lambda size: options.build(task, size, seed),
            lambda text: len(encode(text, task)),
            options.length,
        )
        return encode(prompt.text, task)

    return [one(task, seed) for task, seed in options.wanted]


@dataclasses.dataclass(frozen=True)
class _LayerPrompts:
    """Queries, keys and values of one layer, computed whenever they are read."""

    model: Model
    layer: int
    streams: list[Array]
    lengths: list[Int[Array, " 1"]]

    def __iter__(self) -> Iterator[Calibration]:
        for x, lengths in zip(self.streams, self.lengths, strict=True):
            model = self.model
            qkv = layer_qkv(model.params, self.layer, x, config=model.config, lengths=lengths)
            gram = output_gram(model.params, self.layer)
            weight = 1.0 / jnp.sum(x.astype(jnp.float32) ** 2, axis=2)
            yield Calibration(qkv.q, qkv.k, qkv.v, lengths, gram, weight)


def score_layers(
    model: Model, prompts: Sequence[Sequence[int]], options: SpaceOptions, folder: Path
) -> list[LayerScores]:
    """Scores the candidates in every layer, and keeps the scores of each layer in a file.

    Layers whose files are there are read, and only gone through again. One layer's queries, keys
    and values are in memory at a time, of one prompt if there are several.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        options: the candidates.
        folder: of the files.

    Raises:
        UserError: a file is damaged.
    """
    config, layers = model.config, read_layers(folder)
    found = len(layers)
    if found == config.num_layers:
        return layers
    lengths = [jnp.array([len(tokens)], jnp.int32) for tokens in prompts]
    longest = max(map(len, prompts))

    def embed(tokens: Sequence[int], length: Array) -> Array:
        ids = jnp.array([[*tokens, *[0] * (longest - len(tokens))]], jnp.int32)
        return embed_prompt(model.params, ids, config=config, lengths=length)

    def advance(layer: int, streams: list[Array]) -> list[Array]:
        attention = _attention(layers[layer], options)
        return [
            layer_output(model.params, layer, x, attention, config=config, lengths=length)
            for x, length in zip(streams, lengths, strict=True)
        ]

    streams = [embed(*prompt) for prompt in zip(prompts, lengths, strict=True)]
    for layer in range(found):
        streams = advance(layer, streams)
    numbers = range(found, config.num_layers)
    for layer in tqdm(
        numbers,
        desc="searching",
        unit="layer",
        initial=found,
        total=config.num_layers,
        disable=None,
    ):
        layers.append(_score(_LayerPrompts(model, layer, streams, lengths), options, longest))
        layers[layer].save(folder / _file_name(layer))
        if layer + 1 < config.num_layers:
            streams = advance(layer, streams)
    return layers


def read_layers(folder: Path) -> list[LayerScores]:
    """Returns the scores of the first layers, as far as there are files of them.

    Raises:
        UserError: a file is damaged.
    """
    layers = []
    while (path := folder / _file_name(len(layers))).exists():
        with reported_as_user_error(ValueError, OSError):
            layers.append(LayerScores.load(path))
    return layers


def _file_name(layer: int) -> str:
    return f"layer_{layer:03d}.npz"


def _score(prompts: _LayerPrompts, options: SpaceOptions, length: int) -> LayerScores:
    # Several prompts may not fit together; of one, the projections are not computed again.
    calibrations = list(prompts) if len(prompts.streams) == 1 else prompts
    return score_candidates(
        _candidates(calibrations, options, length, prompts.model.config.num_heads),
        calibrations,
        first_row=options.first_row,
        density=options.measure == "density",
    )


def _candidates(
    calibrations: Calibrations, options: SpaceOptions, length: int, heads: int
) -> Candidates:
    if options.adaptive:
        return options.attention()
    patterns, targets = options.candidates(length)
    if targets is None:
        return for_heads(patterns, heads)
    return fit_budgets(
        patterns, calibrations, target=targets, measure=options.measure, group=options.group
    )


def _attention(scores: LayerScores, options: SpaceOptions) -> AttentionFn:
    """What the following layers see of this one."""
    if options.continue_with == "dense":
        return mj.DenseAttention()
    found, space = picked([scores], choose_each(scores, options)[None]), scores.candidates
    if isinstance(found, mj.AdaptiveAttention):
        return found.layer(0)
    # The candidates' capacities, so that all layers share a program.
    capacities = {name: getattr(space, name) for name in ("max_columns", "max_blocks")}
    return mj.SparseAttention(mj.HeadPatterns.from_grid(found.grid(), **capacities)).layer(0)


def choose_each(scores: LayerScores, options: SpaceOptions) -> Int[np.ndarray, " heads"]:
    """The candidate of each head of a layer, where every head has the same limit of cost."""
    return choose(
        scores,
        options.compared_by,
        at_most=options.limit if options.limited else None,
        measure=options.measure,
        group=options.group,
    )
