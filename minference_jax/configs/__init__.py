"""Pattern files that come with the package, one for each model; the README beside says how made."""

from pathlib import Path

from minference_jax.files import load_patterns
from minference_jax.patterns import HeadPatterns

_FOLDER = Path(__file__).parent


def shipped_patterns(*, folder: Path = _FOLDER) -> list[str]:
    """Names of the pattern files that come with the package.

    Args:
        folder: where they lie.
    """
    return sorted(path.name.removesuffix(".json") for path in folder.glob("*.json"))


def load_shipped(name: str, *, folder: Path = _FOLDER) -> HeadPatterns:
    """Reads a pattern file that comes with the package.

    Args:
        name: one of `shipped_patterns()`.
        folder: where they lie.

    Raises:
        ValueError: there is none of this name.
    """
    names = shipped_patterns(folder=folder)
    if name not in names:
        raise ValueError(
            f"no patterns named {name!r} come with this package; it has: "
            f"{', '.join(names) or 'none'}"
        )
    return load_patterns(folder / f"{name}.json")
