"""Reading a checkpoint's configuration so that nothing in it is overlooked."""

from collections.abc import Iterable, Mapping
from typing import Any

from models.common.weights.errors import LoadError


class Attributes:
    """Attributes of a checkpoint, each accounted for.

    A converter takes what it uses, ignores by name what cannot change the output, and states the
    values it supports for the rest. `finish` then raises one error with every attribute that is
    unsupported, missing or of no known meaning, so that no setting is dropped silently.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        """Starts reading `values`; `origin` names the file in errors."""
        self._values = dict(values)
        self._origin = origin
        self._known: set[str] = set()
        self._problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def take(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or `default` where it is absent or null."""
        self._known.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def require(self, name: str, kind: type, placeholder: Any = 1) -> Any:
        """The attribute's value, which must be there; a number of `kind` greater than zero."""
        value = self.take(name)
        if value is None:
            self.refuse(f"`{name}` is missing")
            return placeholder
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(f"`{name}` = {value!r}, expected a number greater than 0")
            return placeholder
        return kind(value)

    def expect(self, name: str, *allowed: Any, why: str = "") -> None:
        """Accepts the attribute only with one of the `allowed` values, or absent."""
        value = self.take(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed)
            self.refuse(f"`{name}` = {value!r}, supported: {wanted}{f' ({why})' if why else ''}")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks attributes that cannot change the model's output."""
        self._known.update(names)

    def refuse(self, problem: str) -> None:
        """Adds one line to the error that `finish` raises."""
        self._problems.append(problem)

    def problems(self) -> list[str]:
        """Everything wrong so far, unknown attributes included."""
        unknown = [
            f"`{name}` = {value!r} is not known to this converter"
            for name, value in self._values.items()
            if name not in self._known and value is not None
        ]
        return self._problems + unknown

    def finish(self) -> None:
        """Raises LoadError with every problem, unknown attributes included."""
        problems = self.problems()
        if problems:
            raise LoadError(
                f"{self._origin} asks for what this model does not do:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nRemove an attribute only if you know that it does not change the output."
            )
