"""The adaptive patterns element by element in numpy, in float64; shares no code with the library.

One list at a time: `heads` holds the queries [q_len, d] of the heads that share it, `k` the keys
[kv_len, d]. Each function returns the blocks kept for a query tile, a set.
"""

import dataclasses

import numpy as np

from tests.core.brute_force import last_query_sums


@dataclasses.dataclass
class Prompt:
    """One list's queries and keys, and where its tiles lie."""

    heads: list
    k: np.ndarray
    offset: int
    length: int
    block_q: int
    block_kv: int

    def __post_init__(self):
        self.heads = [np.asarray(q, np.float64) for q in self.heads]
        self.k = np.asarray(self.k, np.float64)
        self.end = min(self.length, self.offset + len(self.heads[0]))
        self.scale = self.k.shape[1] ** -0.5
        self.num_blocks = -(-len(self.k) // self.block_kv)

    @property
    def tiles(self):
        firsts = range(self.offset, self.offset + len(self.heads[0]), self.block_q)
        return [first for first in firsts if first < self.end]

    def rows(self, first):
        """Positions of a tile's real rows."""
        return range(first, min(first + self.block_q, self.end))

    def queries(self, positions):
        """The heads' queries at some positions, one after the other."""
        return [q[p - self.offset] for q in self.heads for p in positions]

    def keys_of(self, block):
        return self.k[block * self.block_kv : min((block + 1) * self.block_kv, self.end)]

    def own(self, first):
        return {b for b in self.causal(first) if (b + 1) * self.block_kv > first}

    def causal(self, first):
        last = self.rows(first)[-1]
        return {b for b in range(self.num_blocks) if b * self.block_kv <= last}

    def mask(self, choose):
        """The exact visited mask [q_len, kv_len] where each tile keeps `choose(first)`."""
        mask = np.zeros((len(self.heads[0]), len(self.k)), bool)
        for first in self.tiles:
            for block in (choose(first) | self.own(first)) & self.causal(first):
                for position in self.rows(first):
                    stop = min((block + 1) * self.block_kv, position + 1)
                    mask[position - self.offset, block * self.block_kv : max(stop, 0)] = True
        return mask


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def smallest_set(scores, mass):
    """How many of the largest scores it takes to reach a mass."""
    if mass <= 0:
        return 0
    reached = np.cumsum(np.sort(scores)[::-1]) >= mass
    return int(np.argmax(reached)) + 1 if reached.any() else len(scores)


def largest(scores, number):
    return set(np.argsort(-scores, kind="stable")[:number].tolist())


def block_threshold(prompt, first, *, alpha, sink_blocks, local_blocks, pooled_rows, parts):
    rows = list(prompt.rows(first))
    past = sorted(prompt.causal(first) - prompt.own(first) - set(range(sink_blocks)))
    last = rows[-1] // prompt.block_kv
    kept = set(range(sink_blocks)) | set(range(last - local_blocks + 1, last + 1))
    if past:
        means = [p.mean(axis=0) for b in past for p in np.split(prompt.keys_of(b), parts)]
        score = np.zeros(len(past))
        for at in range(0, len(rows), pooled_rows):
            for q in prompt.heads:
                pooled = [q[p - prompt.offset] for p in rows[at : at + pooled_rows]]
                weights = softmax(np.array(means) @ np.mean(pooled, axis=0) * prompt.scale)
                score += weights.reshape(-1, parts).sum(axis=1)
        kept |= {b for b, s in zip(past, score, strict=True) if s >= alpha * score.max()}
    return kept


def block_mass(prompt, first, *, mass, rows):
    real = list(prompt.rows(first))
    apart = prompt.block_q // rows
    scored = [real[at : at + apart][-1] for at in range(0, len(real), apart)]
    share = np.zeros(prompt.num_blocks)
    for q in prompt.heads:
        for position in scored:
            weights = softmax(prompt.k[: position + 1] @ q[position - prompt.offset] * prompt.scale)
            for key, weight in enumerate(weights):
                share[key // prompt.block_kv] += weight / (len(scored) * len(prompt.heads))
    return {block for block in range(prompt.num_blocks) if share[block] >= mass}


def x_attention(prompt, first, *, tau, stride):
    rows = prompt.rows(first)
    groups = -(-len(prompt.k) // stride)
    mass = np.zeros(prompt.num_blocks)
    for q in prompt.heads:
        for begin in range(first, rows[-1] + 1, stride):
            visible = [g for g in range(groups) if g * stride <= begin]
            scores = []
            for group in visible:
                total = 0.0
                for step in range(stride):
                    key, row = group * stride + step, begin + stride - 1 - step
                    if key < prompt.end and row < prompt.end:
                        total += q[row - prompt.offset] @ prompt.k[key]
                scores.append(total * prompt.scale / stride)
            for group, weight in zip(visible, softmax(scores), strict=True):
                mass[group * stride // prompt.block_kv] += weight
    forced = prompt.own(first) | {0}
    rest = mass.copy()
    rest[sorted(forced)] = 0.0
    needed = tau * mass.sum() - mass[sorted(forced)].sum()
    return forced | (largest(rest, smallest_set(rest, needed)) - forced)


def flex_prefill(prompt, *, gamma, tau, min_budget, max_budget):
    """Returns the function from tile to blocks, and whether the list is query-aware."""
    size = prompt.block_kv
    sums = [
        last_query_sums(q, prompt.k, offset=prompt.offset, length=prompt.end, last_q=prompt.block_q)
        for q in prompt.heads
    ]
    vertical, slash = (np.sum(x, axis=0) / np.sum(x) for x in zip(*sums, strict=True))
    real = range(-(-prompt.end // size))
    pool = lambda x: np.array([x[b * size : (b + 1) * size].sum() for b in real])
    means = np.array([prompt.keys_of(b).mean(axis=0) for b in real])
    last = range(max(prompt.offset, prompt.end - prompt.block_q), prompt.end)
    estimate = softmax(means @ np.mean(prompt.queries(last), axis=0) * prompt.scale)
    middle = (estimate + pool(vertical)) / 2
    divergence = lambda p: sum(x * np.log(x / m) for x, m in zip(p, middle, strict=True) if x > 0)
    aware = np.sqrt((divergence(estimate) + divergence(pool(vertical))) / 2) < tau
    low, high = (max(budget // size, 1) for budget in (min_budget, max_budget))

    def lines(scores):
        below = int((np.cumsum(np.sort(scores)[::-1]) <= gamma).sum())
        number = low if aware else min(max(1 + below // size, low), high)
        blocks = pool(scores)
        blocks[0] = np.inf
        return largest(blocks, number)

    columns, diagonals = lines(vertical), lines(slash)
    entries = {}
    for first in prompt.tiles:
        q = np.mean(prompt.queries(prompt.rows(first)), axis=0)
        causal = sorted(prompt.causal(first))
        for block, value in zip(causal, softmax(means[causal] @ q * prompt.scale), strict=True):
            entries[first, block] = value
    order = sorted(entries, key=lambda at: -entries[at])
    number = smallest_set(np.array(list(entries.values())), gamma * len(prompt.tiles))
    chosen = set(order[:number]) if aware else set()

    def choose(first):
        own = range(first // size, prompt.rows(first)[-1] // size + 1)
        kept = columns | {block - d for block in own for d in diagonals}
        return kept | {block for at, block in chosen if at == first}

    return choose, aware


def columns(prompt, number):
    """The columns that the last 64 queries weigh most."""
    sums = [
        last_query_sums(q, prompt.k, offset=prompt.offset, length=prompt.length)[0]
        for q in prompt.heads
    ]
    return largest(np.sum(sums, axis=0), number)


def block_diagonals(prompt, *, num_diagonals):
    """The exact visited mask of the block diagonals of largest mass."""
    mass_at = np.zeros(prompt.length)
    for q in prompt.heads:
        mass_at += last_query_sums(q, prompt.k, offset=prompt.offset, length=prompt.length)[1]
    shift = prompt.offset % 8
    # Starts relative to the tile's first row rounded down to 8, from the nearest key backwards.
    nearest = prompt.block_q + (8 if shift else 0)
    starts = range(nearest - prompt.block_kv, -len(prompt.k) - prompt.block_q, -prompt.block_kv)
    mass = []
    for start in starts:
        inside = 0.0
        for row in range(prompt.block_q):
            for distance in range(prompt.length):
                if start <= shift + row - distance < start + prompt.block_kv:
                    inside += mass_at[distance] / prompt.block_q
        mass.append(np.inf if start > -prompt.block_kv else inside)
    number = max(num_diagonals, int(np.isinf(mass).sum()))
    chosen = [starts[m] for m in largest(np.array(mass), number)]
    mask = np.zeros((len(prompt.heads[0]), len(prompt.k)), bool)
    for first in prompt.tiles:
        for position in prompt.rows(first):
            for start in chosen:
                begin = first - shift + start
                stop = min(begin + prompt.block_kv, position + 1)
                mask[position - prompt.offset, max(begin, 0) : max(stop, 0)] = True
    return mask
