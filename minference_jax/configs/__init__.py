"""Files that come with the package, of patterns or thresholds; the README beside says how made."""

from pathlib import Path

from minference_jax.adaptive import AdaptiveAttention
from minference_jax.attention import SparseAttention
from minference_jax.files import load_attention

_FOLDER = Path(__file__).parent


def shipped_patterns(*, folder: Path = _FOLDER) -> list[str]:
    """Names of the files that come with the package.

    Args:
        folder: where they lie.
    """
    return sorted(path.name.removesuffix(".json") for path in folder.glob("*.json"))


def load_shipped(name: str, *, folder: Path = _FOLDER) -> SparseAttention | AdaptiveAttention:
    """Reads the attention of a model from a file that comes with the package.

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
    return load_attention(folder / f"{name}.json")
