"""Every candidate's scores for the heads of a layer, what is chosen by them, and their file."""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minference_jax.patterns import HeadPatterns
from minference_jax.search.calibration import Group, pooled
from minference_jax.search.cost import Measure
from minference_jax.search.objective import Objective

_VALUES = ("flops", "density", "output_error", "recall", "log_recall", "count")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerScores:
    """What every candidate costs and keeps in every head of one layer.

    Attributes:
        candidates: patterns [candidates, heads], budgets and all.
        kv_heads: key/value heads of the layer.
        flops: key tiles that the kernel executes, as a share of dense attention's.
        density: (query, key) pairs visited, as a share of the causal ones.
        output_error: see `search.objective` for this and the following.
        recall: mean attention mass visited.
        log_recall: mean logarithm of the mass visited.
        count: share of output elements that are off by more than 5e-3.
    """

    candidates: HeadPatterns
    kv_heads: int
    flops: Float[np.ndarray, "candidates heads"]
    density: Float[np.ndarray, "candidates heads"]
    output_error: Float[np.ndarray, "candidates heads"]
    recall: Float[np.ndarray, "candidates heads"]
    log_recall: Float[np.ndarray, "candidates heads"]
    count: Float[np.ndarray, "candidates heads"]

    def cost(self, measure: Measure) -> Float[np.ndarray, "candidates heads"]:
        """Share of dense attention's work."""
        return getattr(self, measure)

    def loss(self, objective: Objective) -> Float[np.ndarray, "candidates heads"]:
        """What the objective loses: 0 is dense attention, less is better."""
        if objective == "recall":
            return 1.0 - self.recall
        return -self.log_recall if objective == "log_recall" else getattr(self, objective)

    def save(self, path: str | Path) -> None:
        """Writes an .npz file, whole or not at all."""
        arrays: dict[str, Any] = {
            f"candidates.{field.name}": np.asarray(getattr(self.candidates, field.name))
            for field in dataclasses.fields(self.candidates)
        }
        arrays |= {name: getattr(self, name) for name in (*_VALUES, "kv_heads")}
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
            ValueError: it is not such a file.
        """
        try:
            with Path(path).open("rb") as handle, np.load(handle) as file:
                fields = dataclasses.fields(HeadPatterns)
                sizes: dict[str, Any] = {
                    field.name: file[f"candidates.{field.name}"] for field in fields
                }
                sizes |= {f.name: int(sizes[f.name]) for f in fields if f.metadata.get("static")}
                return cls(
                    candidates=HeadPatterns(**sizes),
                    kv_heads=int(file["kv_heads"]),
                    **{name: file[name] for name in _VALUES},
                )
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no scores of this version: {error}") from error


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


def picked(layers: list[LayerScores], chosen: Int[np.ndarray, "layers heads"]) -> HeadPatterns:
    """The patterns of the chosen candidates of every layer."""
    grids = [layer.candidates.grid() for layer in layers]
    return HeadPatterns.from_grid(
        [
            [grid[at][head] for head, at in enumerate(row)]
            for grid, row in zip(grids, chosen, strict=True)
        ]
    )
