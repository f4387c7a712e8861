"""Every candidate's scores for the heads of a layer, what is chosen by them, and their file."""

import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from minference_jax.patterns import HeadPatterns
from minference_jax.search.calibration import Group, pooled
from minference_jax.search.candidates import Candidates, dense_candidate, from_arrays, to_arrays
from minference_jax.search.cost import Measure
from minference_jax.search.objective import Objective

_VALUES = ("flops", "output_error", "recall", "log_recall", "count")
_OPTIONAL = ("density", "residual_error")
# Of dense attention these are 1, the others 0.
_DENSE_HAS_ALL = ("flops", "density", "recall")
# Version 2 added `residual_error`.
_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerScores:
    """What every candidate costs and keeps in every head of one layer.

    Attributes:
        candidates: patterns [candidates, heads], budgets and all; or an attention whose parameters
            are arrays [candidates, heads].
        kv_heads: key/value heads of the layer.
        flops: key tiles that the kernel executes, as a share of dense attention's.
        density: (query, key) pairs visited, as a share of the causal ones; None where they were not
            counted.
        output_error: see `search.objective` for this and the following.
        residual_error: None where the calibration prompts did not say how errors reach the stream.
        recall: mean attention mass visited.
        log_recall: mean logarithm of the mass visited.
        count: share of output elements that are off by more than 5e-3.
    """

    candidates: Candidates
    kv_heads: int
    flops: Float[np.ndarray, "candidates heads"]
    output_error: Float[np.ndarray, "candidates heads"]
    recall: Float[np.ndarray, "candidates heads"]
    log_recall: Float[np.ndarray, "candidates heads"]
    count: Float[np.ndarray, "candidates heads"]
    density: Float[np.ndarray, "candidates heads"] | None = None
    residual_error: Float[np.ndarray, "candidates heads"] | None = None

    def cost(self, measure: Measure) -> Float[np.ndarray, "candidates heads"]:
        """Share of dense attention's work.

        Raises:
            ValueError: it is the density, which was not counted.
        """
        if measure == "density" and self.density is None:
            raise ValueError("the density was not counted: score with `density=True`")
        return getattr(self, measure)

    def loss(self, objective: Objective) -> Float[np.ndarray, "candidates heads"]:
        """What the objective loses: 0 is dense attention, less is better.

        Raises:
            ValueError: it is the residual error, which was not scored.
        """
        if objective == "residual_error" and self.residual_error is None:
            raise ValueError(
                "the residual error was not scored: give `Calibration` the `projection_gram` and "
                "`row_weight` of the model's layer (models.common.capture), or take the objective "
                "output_error, which needs only q, k and v"
            )
        if objective == "recall":
            return 1.0 - self.recall
        return -self.log_recall if objective == "log_recall" else getattr(self, objective)

    def take(self, numbers: Int[np.ndarray, " some"]) -> "LayerScores":
        """The scores of some candidates."""
        return self._each(lambda _, x: x[numbers], lambda x: x[numbers])

    def with_dense(self) -> "LayerScores":
        """Adds dense attention as the last candidate, whose scores need no run.

        Raises:
            ValueError: dense attention cannot be written as a candidate of this kind.
        """
        dense = dense_candidate(self.candidates)
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), self.candidates, dense)
        scores = lambda name, x: np.concatenate([x, np.full_like(x[:1], name in _DENSE_HAS_ALL)])
        new = self._each(scores, lambda x: x)
        return dataclasses.replace(new, candidates=both)

    def _each(self, of_values: Callable, of_parameters: Callable) -> "LayerScores":
        values = {name: getattr(self, name) for name in (*_VALUES, *_OPTIONAL)}
        values = {name: of_values(name, x) for name, x in values.items() if x is not None}
        candidates = jax.tree.map(of_parameters, self.candidates)
        return dataclasses.replace(self, candidates=candidates, **values)

    def save(self, path: str | Path) -> None:
        """Writes an .npz file, whole or not at all.

        Raises:
            ValueError: the candidates are an attention that files cannot hold.
        """
        arrays = to_arrays(self.candidates)
        values = {name: getattr(self, name) for name in (*_VALUES, *_OPTIONAL, "kv_heads")}
        arrays |= {name: value for name, value in values.items() if value is not None}
        arrays["version"] = _VERSION
        path = Path(path)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "LayerScores":
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file, or one of another version.
        """
        try:
            with Path(path).open("rb") as handle, np.load(handle) as file:
                version = int(file["version"]) if "version" in file else 1
                if version != _VERSION:
                    raise ValueError(
                        f"they are of version {version}, expected {_VERSION}; search again into "
                        "another folder"
                    )
                return cls(
                    candidates=from_arrays(file),
                    kv_heads=int(file["kv_heads"]),
                    **{name: file[name] for name in _VALUES},
                    **{name: file.get(name) for name in _OPTIONAL},
                )
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no scores that can be read: {error}") from error


def choose(
    scores: LayerScores,
    objective: Objective,
    *,
    at_most: float | None = None,
    measure: Measure = "flops",
    group: Group = "head",
) -> Int[np.ndarray, " heads"]:
    """The candidate of least loss for each head.

    Args:
        scores: of one layer.
        objective: what is compared.
        at_most: candidates that cost more do not count, unless all do; then the cheapest is taken.
            None: whatever they cost.
        measure: what cost is.
        group: "kv_group" takes one candidate for heads that share keys and values.

    Returns:
        Numbers of candidates. Of equal losses the cheapest is taken, then the first.
    """
    loss = pooled(scores.loss(objective), scores.kv_heads, group)
    cost = pooled(scores.cost(measure), scores.kv_heads, group)
    number = np.broadcast_to(np.arange(len(cost))[:, None], cost.shape)
    if at_most is None:
        above = np.zeros_like(cost)
    else:
        above = np.where(cost > at_most * (1 + 1e-9), cost, 0.0)
    return np.lexsort((number, cost, loss, above), axis=0)[0]


def picked(layers: list[LayerScores], chosen: Int[np.ndarray, "layers heads"]) -> Candidates:
    """The chosen candidates of every layer: patterns, or an attention, [layers, heads]."""
    heads = np.arange(chosen.shape[1])
    rows = [
        jax.tree.map(lambda x, row=row: np.asarray(x)[row, heads], layer.candidates)
        for layer, row in zip(layers, chosen, strict=True)
    ]
    if not isinstance(rows[0], HeadPatterns):
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)
    # Capacities as small as what was chosen allows, not those of all candidates.
    layer = lambda row: jax.tree.map(lambda x: x[None], row).grid()[0]
    return HeadPatterns.from_grid([layer(row) for row in rows])
