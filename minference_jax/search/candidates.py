"""What the search scores: patterns, or an attention with other parameters for each candidate."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.adaptive import AdaptiveAttention, BlockThreshold, Estimator, WithColumns
from minference_jax.adaptive.files import from_content, to_content
from minference_jax.patterns import Dense, HeadPatterns

# What can be scored: patterns, or an attention whose parameters are arrays [candidates, heads].
Candidates = HeadPatterns | AdaptiveAttention

_FIELDS = dataclasses.fields(HeadPatterns)


def for_each_candidate(candidates: Candidates, heads: int) -> Candidates:
    """Gives every parameter its array [candidates, heads].

    Raises:
        ValueError: a parameter has another shape, or none says how many candidates there are.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(candidates)]
    counts = {shape[0] for shape in shapes if len(shape) == 2}
    count = counts.pop() if len(counts) == 1 else 0
    allowed = {(), (1,), (heads,), (count, 1), (count, heads)}
    if not count or any(shape not in allowed for shape in shapes):
        raise ValueError(
            f"the candidates' parameters have the shapes {shapes}; expected numbers, [{heads}] for "
            f"the heads, or [candidates, {heads}], and at least one of the last"
        )
    # With a dtype of its own, a number makes the same program as an array.
    each = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.asarray(x).dtype), (count, heads))
    return jax.tree.map(each, candidates)


def dense_candidate(candidates: Candidates) -> Candidates:
    """The candidate [1, heads] that keeps everything, in the form of others.

    Raises:
        ValueError: it is not known how an estimator keeps everything.
    """
    if isinstance(candidates, HeadPatterns):
        return HeadPatterns.from_grid(
            [[Dense()] * candidates.num_heads],
            max_columns=candidates.max_columns,
            max_blocks=candidates.max_blocks,
        )
    first = jax.tree.map(lambda x: x[:1], candidates)
    return dataclasses.replace(first, estimator=_keep_everything(first.estimator))


def _keep_everything(estimator: Estimator) -> Estimator:
    zero = jnp.zeros_like
    if isinstance(estimator, BlockThreshold):
        return dataclasses.replace(estimator, alpha=zero(estimator.alpha))
    if isinstance(estimator, WithColumns):
        # Columns beside all blocks would only be gathered in vain.
        blocks, columns = _keep_everything(estimator.blocks), zero(estimator.num_columns)
        return dataclasses.replace(estimator, blocks=blocks, num_columns=columns)
    raise ValueError(
        f"no parameters are known with which {type(estimator).__name__} keeps everything; leave "
        "dense heads out"
    )


def to_arrays(candidates: Candidates) -> dict[str, Any]:
    """The arrays of a file, from which `from_arrays` makes the candidates again.

    Raises:
        ValueError: an attention that files cannot hold.
    """
    if isinstance(candidates, HeadPatterns):
        values = {field.name: getattr(candidates, field.name) for field in _FIELDS}
        return {f"candidates.{name}": np.asarray(value) for name, value in values.items()}
    return {"adaptive": np.array(json.dumps(to_content(candidates)))}


def from_arrays(arrays: Mapping[str, Any]) -> Candidates:
    """The candidates that `to_arrays` wrote; raises KeyError or ValueError for other arrays."""
    if "adaptive" in arrays:
        return from_content(json.loads(str(arrays["adaptive"])))
    sizes = {field.name: arrays[f"candidates.{field.name}"] for field in _FIELDS}
    sizes |= {f.name: int(sizes[f.name]) for f in _FIELDS if f.metadata.get("static")}
    return HeadPatterns(**sizes)
