"""Heads whose best pattern is known, because their attention was made that way."""

from statistics import NormalDist

import numpy as np

LENGTH, HEAD_DIM, BLOCK = 512, 128, 16
# Each head's structure and the pattern it calls for; the first four share keys, and the last four.
PLANTED = {
    "wide window": "AShape",
    "narrow window, the end apart": "TriShape",
    "blocks": "BlockSparse",
    "noise": None,
    "columns": "VerticalSlash",
    "diagonals": "VerticalSlash",
    "more diagonals": "VerticalSlash",
    "columns and diagonals": "VerticalSlash",
}
HEADS, KV_HEADS = len(PLANTED), 2
# Coordinates that speak of the position, coarsely and finely, and of content.
_WIDE, _NARROW, _TOKEN = slice(0, 40), slice(40, 80), slice(80, 128)
_STRENGTH = 12.0  # a planted score less that of other keys, in nats


def planted_qkv(seed, length=LENGTH):
    """Queries, keys and values of the PLANTED heads; float32 [1, length, heads, head_dim]."""
    rng = np.random.default_rng(seed)
    q = np.zeros((HEADS, length, HEAD_DIM))
    k = np.zeros((KV_HEADS, length, HEAD_DIM))

    # Most queries that lines are estimated from look elsewhere than the others; beside the narrow
    # window all of them, so that it helps to see everything at the end.
    for head, part, reach, end in ((0, _WIDE, 80, length - BLOCK), (1, _NARROW, 40, length)):
        k[0, :, part] = _positions(length, reach, size=40)
        q[head, :, part] = _STRENGTH * k[0, :, part]
        elsewhere = rng.integers(0, length - 128, end - length + 64)
        q[head, length - 64 : end, part] = _STRENGTH * k[0, elsewhere, part]

    # All queries of a block look at the same three blocks of keys. The windows' queries lean to
    # some blocks, too: little beside a window's keys, but much in a mean over the block.
    codes = _directions(rng, length // BLOCK, 48)
    k[0, :, _TOKEN] = np.repeat(codes, BLOCK, axis=0) + 0.1 * _directions(rng, length, 48)
    for block in range(len(codes)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        for head, number, strength in ((0, 6, 2.0), (1, 6, 2.0), (2, 3, _STRENGTH)):
            wanted = codes[rng.integers(0, block + 1, number)].sum(axis=0)
            q[head, rows, _TOKEN] = strength * wanted
    q[3] = _directions(rng, length, HEAD_DIM)

    # Columns are keys along one direction; each query knows the keys at its diagonals' distances.
    columns, column = rng.choice(length, 16, replace=False), _directions(rng, 1, HEAD_DIM)[0]
    k[1] = _directions(rng, length, HEAD_DIM)
    k[1, columns] += column
    q[[4, 7]] = _STRENGTH * column
    for head, distances in ((5, (24, 72, 136)), (6, (24, 72, 136, 200, 264)), (7, (152, 296))):
        for distance in distances:
            q[head, distance:] += _STRENGTH * k[1, :-distance]

    v = rng.standard_normal(k.shape)
    return [x.transpose(1, 0, 2)[None].astype(np.float32) for x in (q * HEAD_DIM**0.5, k, v)]


def _positions(length, reach, size):
    """Vectors whose products fall with distance, slowly within `reach`, in a wave of period 4.

    Means over a block of keys cannot see the wave.
    """
    normal = [
        NormalDist(np.pi / 2, 1 / reach).inv_cdf((i + 0.5) * 2 / size) for i in range(size // 2)
    ]
    angles = np.outer(np.arange(length), normal)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / (size / 2) ** 0.5


def _directions(rng, number, size):
    x = rng.standard_normal((number, size))
    return x / np.linalg.norm(x, axis=1, keepdims=True)
