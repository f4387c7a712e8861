"""Time, memory and agreement of runs."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

from minference_jax.attention import VisitedPairs
from minference_jax.metrics import next_token_kl, top1_agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near a next-token distribution is to that of dense attention.

    Attributes:
        top1_equal: the likeliest token is the same.
        kl: Kullback-Leibler divergence KL(dense || other), in nats.
        total_variation: half the sum of absolute differences of the probabilities, 0 to 1.
    """

    top1_equal: bool
    kl: float
    total_variation: float


def agreement(
    dense_logits: Float[np.ndarray, " vocab"], logits: Float[np.ndarray, " vocab"]
) -> Agreement:
    """Compares two next-token distributions given by their logits."""
    dense, other = jnp.asarray(dense_logits), jnp.asarray(logits)
    difference = jax.nn.softmax(dense) - jax.nn.softmax(other)
    return Agreement(
        top1_equal=bool(top1_agreement(other, dense)),
        kl=float(next_token_kl(other, dense)),
        total_variation=float(jnp.sum(jnp.abs(difference)) / 2),
    )


def density_of(pairs: VisitedPairs) -> float:
    """Returns the share of the causal pairs visited, over all heads, layers and chunks."""
    visited, causal = (np.sum(np.asarray(count, np.float64)) for count in pairs)
    return round(float(visited / causal), 6)


def peak_memory(devices: int = 1) -> int:
    """Returns the most memory held so far by one of the first devices, in bytes.

    On a CPU it is the process's, which all of its devices share.
    """
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()[:devices]]
        if all("peak_bytes_in_use" in each for each in stats):
            return max(int(each["peak_bytes_in_use"]) for each in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass
class Stage:
    """A step of the work whose duration is known once it has ended."""

    seconds: float = 0.0


@contextlib.contextmanager
def stage(console: Console, doing: str) -> Iterator[Stage]:
    """Shows a step while it runs (on a terminal, with a spinner) and its duration afterwards."""
    step = Stage()
    start = time.perf_counter()
    with console.status(f"{doing} …"):
        yield step
        step.seconds = time.perf_counter() - start
    console.print(f"{doing}: {step.seconds:.1f} s", highlight=False, soft_wrap=True)
