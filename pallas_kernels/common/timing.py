"""Compiling programs side by side, each once, and timing their calls."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

# What a program is compiled for.
Shaped = jax.Array | jax.ShapeDtypeStruct

# A call that takes longer is timed once: the first call, compiled beforehand.
_LONG = 1.0
_ROUNDS, _LEAST_ROUNDS = 5, 3
_MOST_CALLS = 20


class Programs:
    """Jitted programs by a name and the shapes of what they take.

    `add` all of them, `compile` once (in threads: XLA and ptxas run outside Python's lock), then
    `get` each. Arguments of equal shapes share a program, so other data compiles nothing. Those on
    several devices are taken where they lie.
    """

    def __init__(self) -> None:
        self._wanted: dict[Any, tuple[Callable, tuple]] = {}
        self._compiled: dict[Any, jax.stages.Compiled | Exception] = {}
        self._seconds: dict[Any, float] = {}

    def add(self, name: str, function: Callable, *arguments: Any) -> None:
        """Notes a program; arguments may be arrays or shapes."""
        key = _key(name, arguments)
        if key not in self._compiled:
            self._wanted.setdefault(key, (function, jax.tree.map(_shape, arguments)))

    def compile(self, *, keep_going: bool = False) -> None:
        """Compiles what was added since the last call.

        Raises what a compilation raised; with `keep_going`, `get` raises it for that program.
        """

        def build(program):
            function, shapes = program
            start = time.perf_counter()
            try:
                compiled = jax.jit(function).lower(*shapes).compile()
            except Exception as error:
                if not keep_going:
                    raise
                compiled = error
            return compiled, time.perf_counter() - start

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(build, self._wanted.values()))
        for key, (compiled, seconds) in zip(self._wanted, built, strict=True):
            self._compiled[key], self._seconds[key] = compiled, seconds
        self._wanted = {}

    def get(self, name: str, *arguments: Any) -> jax.stages.Compiled:
        """The program for arguments of these shapes; raises KeyError if it was not added."""
        compiled = self._compiled[_key(name, arguments)]
        if isinstance(compiled, Exception):
            raise compiled
        return compiled

    def seconds_to_compile(self, name: str, *arguments: Any) -> float:
        """What `compile` took for a program, beside the others."""
        return self._seconds[_key(name, arguments)]


def time_calls(
    call: Callable[..., Any],
    *arguments: Any,
    check: Callable[[Any], None] | None = None,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    target: float = 0.25,
) -> list[float]:
    """Seconds of one call, measured several times; nothing else runs meanwhile.

    Short calls are queued together, so that what is timed is the device and not the way to it. A
    call of over a second is timed once.

    Args:
        call: compiled, so that its first call does no more than later ones.
        *arguments: of the call.
        check: given the first result before anything else is timed; raises if it is wrong.
        wait: returns once a result is there.
        target: seconds to spend in all.
    """
    start = time.perf_counter()
    result = wait(call(*arguments))
    first = time.perf_counter() - start
    if check is not None:
        check(result)
    del result
    if first > _LONG:
        return [first]
    start = time.perf_counter()
    wait(call(*arguments))
    warm = time.perf_counter() - start
    number = max(1, min(_MOST_CALLS, int(target / _ROUNDS / warm)))
    rounds: list[float] = []
    while len(rounds) < _ROUNDS and (len(rounds) < _LEAST_ROUNDS or sum(rounds) < _LONG):
        start = time.perf_counter()
        wait([call(*arguments) for _ in range(number)][-1])
        rounds.append((time.perf_counter() - start) / number)
    return rounds


def _key(name: str, arguments: tuple) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return name, structure, tuple((x.shape, x.dtype, _spread(x)) for x in leaves)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_spread(x))


def _spread(x: Any) -> jax.sharding.Sharding | None:
    """How an array, or its shape, lies on several devices; None on one, or on the host."""
    sharding = getattr(x, "sharding", None)
    return None if sharding is None or len(sharding.device_set) == 1 else sharding
