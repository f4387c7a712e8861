"""Programs compiled ahead of time, side by side, and all of them before anything is timed."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm


class Program(NamedTuple):
    """A program that is or will be compiled, and the shapes of what it returns."""

    compiled: Future[Any]
    outputs: Any


class Programs:
    """Programs by function, structure and shapes of arguments, and static arguments.

    Functions are named by what lowers them: `function.lower` of a jitted one, or another function
    of the same arguments that decides what it lowers.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Program] = {}
        # Compilation does not need Python, and uses more than one core itself.
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known)

    def add(
        self, lower: Callable[..., jax.stages.Lowered], *arguments: Any, **static: Any
    ) -> Program:
        """Begins to compile in a thread what is not known yet; of arrays, shapes are enough."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        key = (lower, structure, shapes, *static.items())
        if key not in self._known:
            lowered = lower(*arguments, **static)
            outputs = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info
            )
            self._known[key] = Program(self._pool.submit(lowered.compile), outputs)
        return self._known[key]

    def ready(self, program: Program) -> Callable[..., Any]:
        """What takes a program's arguments; while others compile, its times would be too long."""
        left = [one.compiled for one in self._known.values() if not one.compiled.done()]
        for _ in tqdm(as_completed(left), "compiling", len(left), leave=False, disable=None):
            pass
        return program.compiled.result()

    def run(self, lower: Callable[..., jax.stages.Lowered], *arguments: Any, **static: Any) -> Any:
        """What a program returns, which is added if it is not known yet."""
        return self.ready(self.add(lower, *arguments, **static))(*arguments)
