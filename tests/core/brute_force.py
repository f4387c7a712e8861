"""The method, element by element in numpy; shares no code with the library."""

import numpy as np


def last_query_sums(q, k, *, offset, length, last_q=64):
    """Column and distance sums of one head's last real queries. q [q_len, d], k [kv_len, d]."""
    vertical, slash = np.zeros(length), np.zeros(length)
    rows = range(max(0, length - offset - min(last_q, len(q))), length - offset)
    for row in rows:
        position = offset + row
        scores = k[: position + 1].astype(np.float64) @ q[row].astype(np.float64)
        weights = np.exp((scores - scores.max()) / np.sqrt(q.shape[1]))
        weights /= weights.sum()
        vertical[: position + 1] += weights
        slash[position - np.arange(position + 1)] += weights
    return vertical, slash


def largest(scores, forced, budget):
    """The budget's positions: forced ones first, then by score, ties by position."""
    scores = np.where(np.arange(len(scores)) < forced, np.inf, scores)
    return set(np.argsort(-scores, kind="stable")[:budget].tolist())


def tiles_of(wanted, first, *, block_q, block_kv):
    """Keys visited for the chosen distances by the query tile whose first row is at `first`."""
    needed = set()
    for distance in wanted:
        start = first - distance
        rounded = 8 * int(np.floor((start + 4) / 8))
        starts = {rounded} if distance else {8 * (start // 8), 8 * -(-start // 8)}
        for begin in starts:
            needed.update(range(begin, begin + block_q))
    visited, remaining = set(), sorted(needed, reverse=True)
    for key in remaining:
        if key not in visited:
            top = 8 * (key // 8) + 8
            visited.update(range(top - block_kv, top))
    return visited


def mask_of_lines(columns, distances, *, q_len, kv_len, offset, length, block_q, block_kv):
    """The exact visited mask of one head with these lines."""
    mask = np.zeros((q_len, kv_len), bool)
    for row in range(q_len):
        tile_first = offset + row // block_q * block_q
        if tile_first < length:
            keys = tiles_of(distances, tile_first, block_q=block_q, block_kv=block_kv)
            keys = np.fromiter(keys | set(columns), int)
            mask[row, keys[(keys >= 0) & (keys <= offset + row) & (keys < length)]] = True
    return mask


def mask_of_blocks(q, k, budget, *, offset, length, block_q, block_kv):
    """The exact visited mask of one block-sparse head with `budget` tiles for each query tile."""
    mask = np.zeros((len(q), len(k)), bool)
    tiles = range(0, length, block_kv)
    k_means = [k[start : min(start + block_kv, length)].mean(axis=0) for start in tiles]
    for first_row in range(0, len(q), block_q):
        first = offset + first_row
        if first >= length:
            continue
        last = min(first + block_q, length) - 1
        q_mean = q[first_row : last - offset + 1].mean(axis=0)
        causal = [i for i, start in enumerate(tiles) if start <= last]
        own = [i for i in causal if tiles[i] + block_kv > first]
        scores = {i: np.inf if i in own else float(k_means[i] @ q_mean) for i in causal}
        chosen = sorted(causal, key=lambda i: -scores[i])[: max(budget, len(own))]
        for row in range(first_row, min(first_row + block_q, len(q))):
            for i in chosen:
                end = min(tiles[i] + block_kv, offset + row + 1, length)
                mask[row, tiles[i] : max(end, tiles[i])] = True
    return mask
