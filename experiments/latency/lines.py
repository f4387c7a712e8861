"""Line sets of real heads, chosen by `minference visited`, as lists for the kernel."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool

from pallas_kernels.bench import Workload
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.block_sparse_attention.workloads import lines_index

# Heads kept of a model: as many as the layer that is timed has, from all depths.
_HEADS = 32


def save_lines(
    path: Path,
    length: int,
    chosen: dict[str, tuple[Bool[np.ndarray, "heads length"], Bool[np.ndarray, "heads length"]]],
) -> None:
    """Writes the columns and distances of some heads, evenly taken from all.

    Args:
        path: the .npz file.
        length: tokens.
        chosen: by budget, masks over columns and over distances of every head.
    """
    arrays: dict[str, np.ndarray] = {"length": np.array(length)}
    for name, masks in chosen.items():
        for kind, mask in zip(("columns", "distances"), masks, strict=True):
            heads = np.linspace(0, len(mask) - 1, min(_HEADS, len(mask))).astype(int)
            arrays[f"{kind}-{name}"] = np.packbits(mask[heads], axis=1)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def real_lines(path: Path, length: int, block_kvs: tuple[int, ...]) -> list[Workload]:
    """Workloads of the line sets in a file of `save_lines`; none if they are of another length.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    with np.load(path) as arrays:
        if "length" not in arrays:
            raise ValueError(f"{path} holds no line sets; write one with `minference visited`")
        if int(arrays["length"]) != length:
            return []
        names = [key.removeprefix("columns-") for key in arrays if key.startswith("columns-")]
        unpack = lambda key: np.unpackbits(arrays[key], axis=1, count=length).astype(bool)
        chosen = {name: (unpack(f"columns-{name}"), unpack(f"distances-{name}")) for name in names}

    def workload(name, columns, distances, block_kv):
        def build(heads: int, kv_len: int) -> BlockSparseIndex:
            pick = lambda mask: [np.flatnonzero(mask[head % len(mask)]) for head in range(heads)]
            return lines_index(
                pick(columns), pick(distances), 1, kv_len, kv_len, block_kv=block_kv,
                staggered=True,
            )  # fmt: skip

        return Workload(f"{name}-real" + ("" if block_kv == 96 else f"-kv{block_kv}"), build)

    return [
        workload(name, *masks, block_kv) for name, masks in chosen.items() for block_kv in block_kvs
    ]
