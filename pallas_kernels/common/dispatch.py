"""Choice between implementations of one operation: visible, and never a silent fallback."""

import functools
import logging
from collections.abc import Mapping

from pallas_kernels.common.environment import default_device

_log = logging.getLogger(__name__)

# What every operation was traced with so far, in the order of first use.
_used: dict[str, list[str]] = {}


def used_implementations() -> dict[str, list[str]]:
    """Names of the implementations that each operation has run with in this process."""
    return {operation: list(names) for operation, names in _used.items()}


def _use(operation: str, name: str) -> None:
    names = _used.setdefault(operation, [])
    if name not in names:
        names.append(name)


def choose[Function](
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, tuple[Function, str | None]],
) -> Function:
    """The implementation asked for, or the first that can serve.

    Args:
        operation: name of the operation, for messages.
        implementation: name of the implementation, None for an automatic choice.
        candidates: for each implementation, best first, its function and the reason why it cannot
            serve this call (None if it can).

    Returns:
        The function to call. An automatic choice is logged once for each set of reasons.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: the implementation asked for, or every one, cannot serve.
    """
    if implementation is not None:
        if implementation not in candidates:
            raise ValueError(
                f"unknown implementation {implementation!r} of {operation}; expected one of "
                f"{list(candidates)}"
            )
        function, reason = candidates[implementation]
        if reason is not None:
            raise NotImplementedError(f"{operation}: implementation {implementation!r} {reason}")
        _use(operation, implementation)
        return function
    passed_over = tuple((name, why) for name, (_, why) in candidates.items() if why is not None)
    for name, (function, reason) in candidates.items():
        if reason is None:
            _announce(operation, name, passed_over)
            _use(operation, name)
            return function
    raise NotImplementedError(f"{operation}: no implementation can serve: {dict(passed_over)}")


@functools.cache
def _announce(operation: str, name: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    reasons = "".join(f"; {other} {why}" for other, why in passed_over)
    _log.info("%s: implementation %s on %s%s", operation, name, default_device(), reasons)
