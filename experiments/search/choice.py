"""What `minference search` finds in the scores of all layers, and what else they give."""

import numpy as np
from jaxtyping import Int

from experiments.search.calibrate import choose_each
from experiments.search.report import NAMES, Found, label
from experiments.search.space import KINDS, SpaceOptions
from minference_jax.search import LayerScores, choose_globally, picked


def find(layers: list[LayerScores], options: SpaceOptions, length: int) -> Found:
    """The choice that the options ask for.

    Raises:
        ValueError: a common budget is below the cheapest candidates.
    """
    if options.budget == "global":
        return _global(layers, options, length)
    return _each(layers, options, length, np.arange(len(_labels(options, length))))


def find_others(
    layers: list[LayerScores], options: SpaceOptions, length: int
) -> tuple[dict[str, Found], dict[str, str]]:
    """The other choices from the same scores, by the names of their files.

    "patterns_each" and "patterns_global" are the two budgets; "only_a_shape" and others have one
    kind of pattern alone, at the same cost for each head.

    Returns:
        What was found, and why what was not.
    """
    found, missing = {}, {}
    if options.fixed:
        return found, missing
    kinds = _kinds(options, length)
    equal = {"patterns_each": np.arange(len(_labels(options, length)))}
    equal |= {
        f"only_{kind}": np.flatnonzero([x == kind for x in kinds])
        for kind in KINDS
        if kind in kinds
    }
    if options.adaptive or options.limit in options.levels:
        found |= {name: _each(layers, options, length, numbers) for name, numbers in equal.items()}
    else:
        why = f"{options.limit:g} is not among the --levels of the scores"
        missing |= dict.fromkeys(equal, why)
    if len(options.levels) > 1:
        try:
            found["patterns_global"] = _global(layers, options, length)
        except ValueError as error:
            missing["patterns_global"] = str(error)
    else:
        missing["patterns_global"] = "it needs several levels"
    return found, missing


def _each(
    layers: list[LayerScores],
    options: SpaceOptions,
    length: int,
    numbers: Int[np.ndarray, " some"],
) -> Found:
    """Every head the best of some candidates, within the same limit."""
    layers = [scores.take(numbers) for scores in layers]
    chosen = np.stack([choose_each(scores, options) for scores in layers])
    labels = _labels(options, length)
    return _found(layers, chosen, options, [labels[number] for number in numbers])


def _global(layers: list[LayerScores], options: SpaceOptions, length: int) -> Found:
    """A common budget for all heads, of which some may be dense."""
    labels = _labels(options, length)
    if options.dense:
        layers, labels = [scores.with_dense() for scores in layers], [*labels, "dense"]
    chosen = choose_globally(
        layers,
        options.compared_by,
        at_most=options.limit,
        measure=options.measure,
        group=options.group,
    )
    return _found(layers, chosen, options, labels)


def _found(
    layers: list[LayerScores],
    chosen: Int[np.ndarray, "layers heads"],
    options: SpaceOptions,
    labels: list[str],
) -> Found:
    return Found(
        attention=picked(layers, chosen),
        layers=layers,
        chosen=chosen,
        objective=options.compared_by,
        labels=labels,
    )


def _labels(options: SpaceOptions, length: int) -> list[str]:
    """The scored candidates in words."""
    if options.adaptive:
        columns = f", {options.columns} columns" if options.space == "hybrid" else ""
        return [f"alpha {alpha:g}{columns}" for alpha in options.levels]
    patterns, targets = options.candidates(length)
    labels = [label(pattern) for pattern in patterns]
    if targets is None or len(options.levels) == 1:
        return labels
    return [f"{name} at {at:.3g}" for name, at in zip(labels, targets, strict=True)]


def _kinds(options: SpaceOptions, length: int) -> list[str]:
    patterns = [] if options.adaptive else options.candidates(length)[0]
    return [NAMES[type(pattern)] for pattern in patterns]
