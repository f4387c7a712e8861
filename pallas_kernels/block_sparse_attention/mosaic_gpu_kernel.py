"""The kernel's body: one warpgroup copies keys and values, two compute 64 query rows each."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.config import BLOCK_Q, COMPUTE_WARPGROUPS, ROWS, Config
from pallas_kernels.block_sparse_attention.mosaic_gpu_items import Work
from pallas_kernels.block_sparse_attention.plan import FIELDS
from pallas_kernels.common.online_softmax import LOG2E
from pallas_kernels.common.tiling import cdiv

_WGMMA = plgpu.Layout.WGMMA
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)


class Scratch(NamedTuple):
    """Shared memory of one block; `q` is None where the queries are kept in registers."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


def kernel(
    q_ref,
    k_ref,
    v_ref,
    entries_ref,
    lists_ref,
    *rest,
    scratch,
    config,
    block_kv,
    staggered,
):
    """One block: one query tile of one head."""
    *column_refs, out_ref, lse_ref = rest
    heads = q_ref.shape[2]
    batch, head = lax.div(lax.axis_index("head"), heads), lax.rem(lax.axis_index("head"), heads)
    kv_head = lax.div(head, heads // k_ref.shape[2])
    # Later tiles see more keys: longest first.
    tile = lists_ref.shape[2] - 1 - lax.axis_index("tile")
    fields = [lists_ref[batch, head, tile, i] for i in range(FIELDS)]
    work = Work(
        batch, head, tile, *fields, entries=entries_ref, block_kv=block_kv, staggered=staggered,
        kv_len=k_ref.shape[1], column_ids=column_refs[2] if column_refs else None,
        column_bits=column_refs[3] if column_refs else None,
    )  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _produce(work, scratch, config, kv_head, k_ref, v_ref, column_refs[:2])

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute(work, scratch, config, warpgroup, q_ref, out_ref, lse_ref)


def _produce(work: Work, scratch: Scratch, config: Config, kv_head, k_ref, v_ref, column_refs):
    """Copies keys and values of every item into their rings of stages, in order."""
    own = config.v_stages - _lent_stages(scratch, config)

    def load(n, keys, values):
        for source, target, full, free, unused in (
            (keys, scratch.k, scratch.k_full, scratch.k_free, config.k_stages),
            (values, scratch.v, scratch.v_full, scratch.v_free, own),
        ):
            slot = lax.rem(n, target.shape[0])
            target = target.at[slot, pl.ds(0, source.shape[0])]
            pl.when(n >= unused)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    def load_tile(n, size):
        rows = pl.ds(pl.multiple_of(jnp.maximum(work.start(n), 0), 8), size)
        load(n, *(ref.at[work.batch, rows, kv_head] for ref in (k_ref, v_ref)))

    @pl.loop(0, work.listed)
    def _(n):
        if work.staggered:
            # The warpgroups of a list that is not shifted visit the same keys.
            shifted = work.shift > 0
            pl.when(shifted)(lambda: load_tile(n, scratch.k.shape[1]))
            pl.when(jnp.logical_not(shifted))(lambda: load_tile(n, work.block_kv))
        else:
            load_tile(n, work.block_kv)

    if column_refs:

        @pl.loop(0, work.columns_all)
        def _(n):
            rows = pl.ds(pl.multiple_of(n * work.block_kv, work.block_kv), work.block_kv)
            load(work.listed + n, *(ref.at[work.batch, work.head, rows] for ref in column_refs))

    # A block may not end before every completion of its barriers was awaited.
    for free, stages, unused in (
        (scratch.k_free, config.k_stages, config.k_stages),
        (scratch.v_free, config.v_stages, own),
    ):

        @pl.loop(jnp.maximum(work.total, unused), work.total + stages)
        def _(n, free=free, stages=stages):
            plgpu.barrier_wait(free.at[lax.rem(n, stages)])


def _lent_stages(scratch: Scratch, config: Config) -> int:
    """Last stages of values through which queries pass on their way to registers."""
    return cdiv(BLOCK_Q, scratch.v.shape[1]) if config.queries_in_registers else 0


def _compute(
    work: Work, scratch: Scratch, config: Config, warpgroup, q_ref, out_ref, lse_ref
):  # fmt: skip
    """Visits every item for 64 query rows and writes their output and log-sum-exp."""
    rows = pl.ds(pl.multiple_of(work.tile * BLOCK_Q + warpgroup * ROWS, ROWS), ROWS)
    lent = _lent_stages(scratch, config)
    first_lent = config.v_stages - lent
    if lent == 0:
        q = scratch.q.at[warpgroup]
    elif lent == 1:
        q = scratch.v.at[first_lent, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)]
    else:
        q = scratch.v.at[first_lent + warpgroup, pl.ds(0, ROWS)]
    plgpu.copy_gmem_to_smem(q_ref.at[work.batch, rows, work.head], q, scratch.q_full.at[warpgroup])
    plgpu.barrier_wait(scratch.q_full.at[warpgroup])
    if config.queries_in_registers:
        q = plgpu.load(q, layout=_WGMMA)
        # Orders this read before the copy of values that overwrites the queries.
        plgpu.commit_smem()
        for stage in range(first_lent, config.v_stages):
            plgpu.barrier_arrive(scratch.v_free.at[stage])
    visit = Visit(work, scratch, config, warpgroup, q, q_ref.dtype)
    acc, m, l = visit.everything()

    per_row = lambda x: lax.broadcast_in_dim(x, acc.shape, [0])
    seen = l > 0.0
    inverse = jnp.where(seen, 1.0 / l, 0.0)
    lse = jnp.where(seen, m * (1.0 / LOG2E) + jnp.log(l), -jnp.inf)
    out_ref[work.batch, rows, work.head] = (acc * per_row(inverse)).astype(q_ref.dtype)
    lse_ref[work.batch, work.head, rows] = lse


@dataclasses.dataclass(frozen=True)
class Visit:
    """The online softmax of one warpgroup.

    The state between items is (acc, m, l, p, row): p are the weights of the last item, whose
    product with its values (from `row` of their stage on) is still to come. It runs beside the
    scores of the next item, so the tensor cores work while the softmax does.
    """

    work: Work
    scratch: Scratch
    config: Config
    warpgroup: Any
    q: Any
    dtype: Any

    def keys(self, n):
        """The stage that holds the keys of item n."""
        return lax.rem(n, self.config.k_stages)

    def values(self, n):
        """The stage that holds the values of item n."""
        return lax.rem(n, self.config.v_stages)

    def stage(self, ref, slot, row):
        """The rows of a stage that this warpgroup reads."""
        if not self.work.staggered:
            return ref.at[slot]
        row = row if isinstance(row, int) else pl.multiple_of(row, 8)
        return ref.at[slot, pl.ds(row, self.work.block_kv)]

    def everything(self):
        """Unnormalised output, maximum and sum of weights after all items."""
        work = self.work
        shifted = self.warpgroup * work.shift
        state = self.first()
        state = self.loop(1, work.masked, state, work.hide_keys)
        state = self.loop(work.masked, work.listed, state, None, shifted)
        if work.column_ids is not None:
            early = work.listed + work.columns_full
            state = self.loop(work.listed, early, state, work.hide_columns, 0)
            state = self.loop(early, work.total, state, work.hide_late_columns, 0)
        acc, m, l, p, row = state
        n = work.total - 1
        values = self.stage(self.scratch.v, self.values(n), row)
        plgpu.barrier_wait(self.scratch.v_full.at[self.values(n)])
        initial: Any = plgpu.ACC.init(acc)
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(initial)
        plgpu.barrier_arrive(self.scratch.v_free.at[self.values(n)])
        return acc, m, l

    def loop(self, low, high, state, hide, row=None):
        """Visits the items of one kind; `row` is where the warpgroup's rows of a stage begin."""

        def step(n, state):
            at = self.work.window(n, self.warpgroup)[1] if row is None else row
            return self.item(n, state, hide, at)

        return lax.fori_loop(low, high, step, state)

    def softmax(self, s, m, masked):
        """New maximum, factor for what was summed so far, weights; all in log2 units."""
        scale = self.q.shape[1] ** -0.5 * LOG2E
        m_new = jnp.maximum(m, s.max(axis=1) * scale)
        # Of a row that has seen no key yet, every weight must be 0: exp2(-inf - 0).
        m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
        alpha = jnp.exp2(m - m_safe)
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_safe, s.shape, [0]))
        return m_new, alpha, p

    def wait_keys(self, n):
        """Waits until the keys of item n, if there is one, have arrived."""

        @pl.when(n < self.work.total)
        def _():
            plgpu.barrier_wait(self.scratch.k_full.at[self.keys(n)])

    def first(self):
        """The first item, always masked."""
        shape = (ROWS, self.work.block_kv)

        row = self.work.window(0, self.warpgroup)[1]

        def scores(ref):
            plgpu.wgmma(ref, self.q, self.stage(self.scratch.k, 0, row).T)
            return ref[...]

        plgpu.barrier_wait(self.scratch.k_full.at[0])
        s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(self.scratch.k_free.at[0])
        m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), _PER_ROW)
        acc = jnp.zeros((ROWS, self.q.shape[1]), jnp.float32)
        m, _, p = self.softmax(self.work.hide_keys(0, self.warpgroup, s), m, masked=True)
        self.wait_keys(1)
        acc = plgpu.layout_cast(acc, _WGMMA)
        return acc, m, p.sum(axis=1), p.astype(self.dtype), row

    def item(self, n, state, hide, row):
        """Scores of item n beside the value product of the item before."""
        acc, m, l, p, row_before = state
        slot, before = self.keys(n), self.values(n - 1)
        shape = (ROWS, self.work.block_kv)
        scratch = self.scratch

        def products(refs):
            acc_ref, m_ref, l_ref, alpha_ref, p_ref = refs

            def scores_and_values(s_ref):
                plgpu.wgmma(s_ref, self.q, self.stage(scratch.k, slot, row).T)
                plgpu.barrier_wait(scratch.v_full.at[before])
                plgpu.wgmma(acc_ref, p, self.stage(scratch.v, before, row_before))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                plgpu.barrier_arrive(scratch.k_free.at[slot])
                s = s if hide is None else hide(n, self.warpgroup, s)
                m_new, alpha, p_new = self.softmax(s, m_ref[...], masked=hide is not None)
                l_new = l_ref[...] * alpha + p_new.sum(axis=1)
                # The barrier and the branch of the wait keep the compiler from moving the softmax
                # below the end of the value product. The weights become 16-bit only after it:
                # operands of a running product may not be written.
                m_ref[...], l_ref[...], alpha_ref[...], p_ref[...] = lax.optimization_barrier(
                    (m_new, l_new, alpha, p_new)
                )
                self.wait_keys(n + 1)

            pl.run_scoped(scores_and_values, plgpu.ACC(shape, jnp.float32))

        p_new = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _WGMMA)
        initial: Any = (plgpu.ACC.init(acc), m, l, jnp.zeros_like(m), p_new)
        acc, m, l, alpha, p_new = pl.run_state(products)(initial)
        plgpu.barrier_arrive(scratch.v_free.at[before])
        acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
        return acc, m, l, p_new.astype(self.dtype), jnp.int32(row)
