"""The kernel's body: one warpgroup copies means, two compute 128 query rows each.

A block has 256 rows of one head; the means that any of them sees stream through shared memory
twice. Pass 1 takes `rows x means` products for each row's log-sum-exp, pass 2 the transposed ones,
so that a sum over rows is a sum along registers: see README.md.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.online_softmax import LOG2E, MASK_VALUE

_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_FLAT = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

# Warpgroups that compute, each with rows of its own, and the rows of a block.
WORKERS = 2
ROWS = 128
BLOCK_ROWS = WORKERS * ROWS
# Means of one stage, and half of it: the M of wgmma.
MEANS = 128
_HALF = 64
STAGES = 4


class Scratch(NamedTuple):
    """Shared memory of one block."""

    q: Any
    means: Any
    lse: Any
    q_full: Any
    full: Any
    free: Any


def kernel(q_ref, means_ref, visible_ref, bounds_ref, out_ref, *, scratch, width, scale):
    """One block; `width` rows a sum, `scale` in log2 units."""
    heads = q_ref.shape[2]
    batch, head = lax.div(lax.axis_index("head"), heads), lax.rem(lax.axis_index("head"), heads)
    kv_head = lax.div(head, heads // means_ref.shape[1])
    # Later blocks usually see more: longest first.
    block = bounds_ref.shape[1] // WORKERS - 1 - lax.axis_index("block")
    groups = [block * WORKERS + i for i in range(WORKERS)]
    # Read in each branch: a number that lives across both costs a spill.
    total = lambda: functools.reduce(jnp.maximum, [bounds_ref[batch, i, 1] for i in groups])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _produce(means_ref.at[batch, kv_head], scratch, total())

    @pl.when(warpgroup < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        group = block * WORKERS + warpgroup
        rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)
        plgpu.copy_gmem_to_smem(
            q_ref.at[batch, rows, head], scratch.q.at[warpgroup], scratch.q_full.at[warpgroup]
        )
        plgpu.barrier_wait(scratch.q_full.at[warpgroup])
        work = _Work(
            scratch, scratch.q.at[warpgroup], scratch.lse.at[warpgroup],
            visible_ref.at[batch, rows], bounds_ref[batch, group, 0], total(), scale,
        )  # fmt: skip
        work.wait(0)
        _statistics(work)
        # Orders the writes of log-sum-exps before their reads by other threads.
        plgpu.commit_smem()
        _sums(work, out_ref.at[batch, head, pl.ds(group * (ROWS // width), ROWS // width)], width)


def _produce(means_ref, scratch, total):
    """Copies the visible means into the ring of stages, twice."""

    @pl.loop(0, 2 * total)
    def _(n):
        slot = lax.rem(n, STAGES)
        pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
        stage = jnp.where(n < total, n, n - total)
        rows = pl.ds(pl.multiple_of(stage * MEANS, MEANS), MEANS)
        plgpu.copy_gmem_to_smem(means_ref.at[rows], scratch.means.at[slot], scratch.full.at[slot])

    # Every completion is awaited before the block ends.
    @pl.loop(jnp.maximum(2 * total, STAGES), 2 * total + STAGES)
    def _(n):
        plgpu.barrier_wait(scratch.free.at[lax.rem(n, STAGES)])


class _Work(NamedTuple):
    """What one warpgroup works on: 128 rows of a head."""

    scratch: Scratch
    q: Any
    lse: Any
    visible: Any
    full: Any
    total: Any
    scale: float

    def wait(self, n):
        """Waits until the n-th stage of both passes, if there is one, has arrived."""

        @pl.when(n < 2 * self.total)
        def _():
            plgpu.barrier_wait(self.scratch.full.at[lax.rem(n, STAGES)])

    def loop(self, before, visit, state):
        """Visits every stage, after `before` stages: `visit(stage, step, state, masked)`.

        Masked are the stages that not every row sees in full.
        """

        def one(stage, state, masked):
            return visit(stage, _Step(self, before + stage), state, masked)

        state = lax.fori_loop(0, self.full, functools.partial(one, masked=False), state)
        return lax.fori_loop(self.full, self.total, functools.partial(one, masked=True), state)


class _Step(NamedTuple):
    """The n-th stage of both passes; it has arrived."""

    work: _Work
    n: Any

    @property
    def means(self):
        return self.work.scratch.means.at[lax.rem(self.n, STAGES)]

    def two_products(self, left, right, shape, use):
        """Uses the products of both left tiles with one right tile.

        `use(0, product)` runs beside the second product; then the stage is given back.
        """

        def products(first, second):
            plgpu.wgmma(first, left[0], right.T)
            plgpu.wgmma(second, left[1], right.T)
            out = use(0, plgpu.wgmma_accumulator_load(first, wait_n=1))
            # Its branch keeps the compiler from moving the use above below the second product.
            self.work.wait(self.n + 1)
            s = plgpu.wgmma_accumulator_load(second)
            plgpu.barrier_arrive(self.work.scratch.free.at[lax.rem(self.n, STAGES)])
            return out, use(1, s)

        accumulator = plgpu.ACC(shape, jnp.float32)
        return pl.run_scoped(products, accumulator, accumulator)


def _halves(ref):
    return [ref.at[pl.ds(half * _HALF, _HALF)] for half in range(2)]


def _statistics(work: _Work):
    """Pass 1: writes each row's log-sum-exp, in log2 units, to shared memory; inf if it is 0."""
    shape = (_HALF, MEANS)
    mean = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    visible = [plgpu.load(x, layout=_ROW, optimized=False) for x in _halves(work.visible)]
    per_row = lambda x: lax.broadcast_in_dim(x, shape, [0])

    def visit(stage, step, state, masked):
        def use(half, s):
            m, l = state[half]
            see = lambda x, otherwise: x
            if masked:
                seen = mean < per_row(visible[half] - stage * MEANS)
                see = lambda x, otherwise: jnp.where(seen, x, otherwise)
            m_new = jnp.maximum(m, see(s, MASK_VALUE).max(axis=1) * work.scale)
            p = see(jnp.exp2(s * work.scale - per_row(m_new)), 0.0)
            # Here and not after the other product: see `two_products`.
            return lax.optimization_barrier((m_new, l * jnp.exp2(m - m_new) + p.sum(axis=1)))

        return step.two_products(_halves(work.q), step.means, shape, use)

    constant = lambda value: plgpu.layout_cast(jnp.full((_HALF,), value, jnp.float32), _ROW)
    start = (constant(MASK_VALUE), constant(0.0))
    for (m, l), lse in zip(work.loop(0, visit, (start, start)), _halves(work.lse), strict=True):
        lse[...] = jnp.where(l > 0.0, m + jnp.log(l) * LOG2E, jnp.inf)


def _sums(work: _Work, out_ref, width):
    """Pass 2: writes the rows' weights, summed over `width` rows each; 0 where nothing is seen."""
    shape = (_HALF, ROWS)
    mean = plgpu.broadcasted_iota(jnp.int32, (_HALF,), 0, layout=_ROW)
    lse = lax.broadcast_in_dim(plgpu.load(work.lse, layout=_COLUMN), shape, [1])

    def visit(stage, step, state, masked):
        # All rows of a tile see the same means, but those that count nothing.
        seen = [work.visible[i] for i in range(0, ROWS, width)] if masked else []

        def use(half, s):
            begin = stage * MEANS + half * _HALF
            p = jnp.exp2(s * work.scale - lse)
            if masked:
                # Rows that count nothing may hold anything, NaN as well.
                p = jnp.where(lse < jnp.inf, p, 0.0)
            columns = pl.ds(pl.multiple_of(begin, _HALF), _HALF)
            for tile in range(ROWS // width):
                scores = p[:, tile * width : (tile + 1) * width].sum(axis=1)
                if masked:
                    scores = jnp.where(mean < seen[tile] - begin, scores, 0.0)
                out_ref[tile, columns] = scores
            return ()

        step.two_products(_halves(step.means), work.q, shape, use)
        return state

    work.loop(work.total, visit, jnp.int32(0))
    zeros = plgpu.layout_cast(jnp.zeros((MEANS,), jnp.float32), _FLAT)

    @pl.loop(work.total, out_ref.shape[1] // MEANS)
    def _(stage):
        columns = pl.ds(pl.multiple_of(stage * MEANS, MEANS), MEANS)
        for tile in range(ROWS // width):
            out_ref[tile, columns] = zeros
