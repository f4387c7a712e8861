"""The op on Hopper: one warp-specialised Pallas (Mosaic GPU) kernel for all heads of a layer.

One warpgroup copies key and value tiles into a ring of shared-memory stages; two more compute 64
query rows each. README.md explains the structure and what was measured.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.config import (
    COMPUTE_WARPGROUPS,
    ROWS,
    Config,
    default_config,
)
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.block_sparse_attention.plan import FIELDS, Plan, gather_columns, make_plan
from pallas_kernels.common.online_softmax import LOG2E

_WGMMA = plgpu.Layout.WGMMA
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)
_PER_KEY = plgpu.Layout.WGMMA.reduce(0)

_BLOCK_Q = COMPUTE_WARPGROUPS * ROWS
_HEAD_DIMS = (64, 96, 128, 256)
_BLOCK_KVS = (64, 128)


def unsupported(q: Array, k: Array, v: Array, index: BlockSparseIndex) -> str | None:
    """Why this kernel cannot serve these arrays, None if it can."""
    head_dim = q.shape[3]
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"needs q, k and v all bfloat16 or all float16, got {sorted(dtypes)}"
    if head_dim not in _HEAD_DIMS:
        return f"needs head_dim in {_HEAD_DIMS}, got {head_dim}"
    if index.block_q != _BLOCK_Q:
        return f"needs block_q {_BLOCK_Q}, got {index.block_q}"
    if index.block_kv not in _BLOCK_KVS:
        return f"needs block_kv in {_BLOCK_KVS}, got {index.block_kv}"
    if default_config(head_dim, index.stage_rows) is None:
        return f"block_kv {index.block_kv} does not fit shared memory at head_dim {head_dim}"
    return None


def block_sparse_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    index: BlockSparseIndex,
    *,
    lengths: Int[Array, " batch"],
    q_offset: Int[Array, ""],
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """Output in q's dtype and natural-log log-sum-exp; see `unsupported` for what it serves."""
    q_len = q.shape[1]
    config = config or default_config(q.shape[3], index.stage_rows)
    # The bulk copies see rows in groups of 8; they fill rows past the end with zeros.
    q, k, v = (_pad_rows(x) for x in (q, k, v))
    plan = make_plan(index, lengths=lengths, q_offset=q_offset)
    columns = gather_columns(k, v, index) if plan.column_ids.shape[2] else None
    out, lse = _launch(q, k, v, index, plan, columns, config, interpret)
    return out[:, :q_len], lse[:, :, :q_len]


def _pad_rows(x):
    missing = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


class _Scratch(NamedTuple):
    """Shared memory of one block: q doubles as the output's staging buffer."""

    q: Any
    k: Any
    v: Any
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


def _launch(q, k, v, index, plan: Plan, columns, config: Config, interpret):
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    tiles = index.begin.shape[2]
    swizzle = plgpu.find_swizzle(head_dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    tile = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=transforms)
    free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.stages)
    full = plgpu.Barrier(num_barriers=config.stages)
    scratch = _Scratch(
        q=tile(COMPUTE_WARPGROUPS, ROWS, head_dim),
        k=tile(config.stages, index.stage_rows, head_dim),
        v=tile(config.stages, index.stage_rows, head_dim),
        lse=plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        k_full=full,
        v_full=full,
        k_free=free,
        v_free=free,
    )
    body = functools.partial(
        _kernel, config=config, kv_heads=kv_heads, group=heads // kv_heads,
        block_kv=index.block_kv, staggered=index.staggered,
    )  # fmt: skip
    arrays = [q, k, v, index.entries, plan.lists]
    if columns is not None:
        arrays += [*columns, plan.column_ids, plan.column_bits]
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * _BLOCK_Q), jnp.float32),
        ],
        # Neighbouring blocks serve the query heads of one key/value head: they share its cache.
        grid=(batch * kv_heads, tiles, heads // kv_heads),
        grid_names=("kv", "tile", "member"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={"scratch": scratch},
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="block_sparse_attention",
        **({} if interpret is None else {"interpret": interpret}),
    )(*arrays)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    entries_ref,
    lists_ref,
    *rest,
    scratch,
    config,
    kv_heads,
    group,
    block_kv,
    staggered,
):
    *column_refs, out_ref, lse_ref = rest
    kv = lax.axis_index("kv")
    kv_head = lax.rem(kv, kv_heads)
    batch, head = lax.div(kv, kv_heads), kv_head * group + lax.axis_index("member")
    # Later tiles see more keys: longest first.
    tile = lists_ref.shape[2] - 1 - lax.axis_index("tile")
    fields = [lists_ref[batch, head, tile, i] for i in range(FIELDS)]
    work = _Work(
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


@dataclasses.dataclass(frozen=True)
class _Work:
    """One query tile's items in the order of their visit: masked tiles, full tiles, columns."""

    batch: Any
    head: Any
    tile: Any
    begin: Any
    count: Any
    origin: Any
    shift: Any
    front: Any
    tail: Any
    first_row: Any
    length: Any
    columns_full: Any
    columns_all: Any
    entries: Any
    block_kv: int
    staggered: bool
    kv_len: int
    column_ids: Any
    column_bits: Any

    @property
    def masked(self):
        """Items that need a mask: tiles at the diagonal, at the end, and that begin before 0."""
        return self.front + self.tail

    @property
    def listed(self):
        """Key tiles; an empty list visits one tile after every key, so there always is one."""
        return jnp.maximum(self.count, 1)

    @property
    def total(self):
        return self.listed if self.column_ids is None else self.listed + self.columns_all

    def start(self, n):
        """First key of the n-th item, for the first half of the rows."""
        last = self.count - self.tail - self.front
        at = n - jnp.where(n < self.front, 0, jnp.where(n < self.masked, -last, self.tail))
        start = self.origin + self.entries[self.batch, self.head, self.begin + at]
        return jnp.where(self.count > 0, start, self.kv_len)

    def window(self, n, warpgroup):
        """First key that a warpgroup visits of a masked tile, and its row in the stage.

        Tiles are copied from key 0 where they begin before it.
        """
        start = self.start(n)
        first = jnp.maximum(start + warpgroup * self.shift, 0)
        return first, first - jnp.maximum(start, 0)

    def iota(self, axis):
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, self.block_kv), axis, layout=_WGMMA)

    def rows(self, warpgroup):
        """Positions of a warpgroup's rows."""
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_PER_ROW)
        return row + (self.first_row + warpgroup * ROWS)

    def sees_tile(self, n, warpgroup):
        """Mask of a key tile."""
        first, _ = self.window(n, warpgroup)
        end = self.start(n) + warpgroup * self.shift + self.block_kv
        keys = jnp.minimum(jnp.minimum(end, self.length), self.rows(warpgroup) + 1) - first
        return self.iota(1) < lax.broadcast_in_dim(keys, (ROWS, self.block_kv), [0])

    def sees_columns(self, n, warpgroup):
        """Mask of a tile of columns before every row: one bit each."""
        words = self.block_kv // 32
        base = (n - self.listed) * words
        if self.staggered:
            base += warpgroup * (self.column_ids.shape[2] // 32)
        bits = [self.column_bits[self.batch, self.head, self.tile, base + i] for i in range(words)]
        word = jnp.full((ROWS, self.block_kv), bits[0])
        for i in range(1, words):
            word = jnp.where(self.iota(1) < 32 * i, word, bits[i])
        word = plgpu.layout_cast(word, _WGMMA)
        # A thread's columns differ in other bits than 1 and 2: one shift by these serves them all.
        column = self.iota(1)
        shared = lax.shift_right_logical(word, column & 6)
        return lax.shift_right_logical(shared, column & 25) & 1 == 1

    def sees_late_columns(self, n, warpgroup):
        """Mask of a tile of columns some of which lie after some rows."""
        at = pl.ds(pl.multiple_of((n - self.listed) * self.block_kv, self.block_kv), self.block_kv)
        ids = self.column_ids.at[self.batch, self.head, at]
        ids = plgpu.load(ids, layout=_PER_KEY, optimized=False)
        ids = lax.broadcast_in_dim(ids, (ROWS, self.block_kv), [1])
        rows = lax.broadcast_in_dim(self.rows(warpgroup), (ROWS, self.block_kv), [0])
        return self.sees_columns(n, warpgroup) & (ids <= rows)


def _produce(work: _Work, scratch: _Scratch, config: Config, kv_head, k_ref, v_ref, column_refs):
    """Copies keys and values of every item into the ring of stages, in order."""
    stages, stage_rows = config.stages, scratch.k.shape[1]

    def load(n, keys, values):
        slot = lax.rem(n, stages)
        for source, target, full, free in (
            (keys, scratch.k, scratch.k_full, scratch.k_free),
            (values, scratch.v, scratch.v_full, scratch.v_free),
        ):
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    @pl.loop(0, work.listed)
    def _(n):
        rows = pl.ds(pl.multiple_of(jnp.maximum(work.start(n), 0), 8), stage_rows)
        load(n, *(ref.at[work.batch, rows, kv_head] for ref in (k_ref, v_ref)))

    if column_refs:

        @pl.loop(0, work.columns_all)
        def _(n):
            rows = pl.ds(pl.multiple_of(n * work.block_kv, work.block_kv), stage_rows)
            load(work.listed + n, *(ref.at[work.batch, work.head, rows] for ref in column_refs))

    # A block may not end before every completion of its barriers was awaited.
    @pl.loop(jnp.maximum(work.total, stages), work.total + stages)
    def _(n):
        plgpu.barrier_wait(scratch.k_free.at[lax.rem(n, stages)])
        plgpu.barrier_wait(scratch.v_free.at[lax.rem(n, stages)])


def _compute(
    work: _Work, scratch: _Scratch, config: Config, warpgroup, q_ref, out_ref, lse_ref
):  # fmt: skip
    """Visits every item for 64 query rows and writes their output and log-sum-exp."""
    rows = pl.ds(pl.multiple_of(work.tile * _BLOCK_Q + warpgroup * ROWS, ROWS), ROWS)
    q_tile = scratch.q.at[warpgroup]
    plgpu.copy_gmem_to_smem(
        q_ref.at[work.batch, rows, work.head], q_tile, scratch.q_full.at[warpgroup]
    )
    plgpu.barrier_wait(scratch.q_full.at[warpgroup])
    q = q_tile
    if config.queries_in_registers:
        q = plgpu.load(q_tile, layout=_WGMMA)
    visit = _Visit(work, scratch, config, warpgroup, q, q_ref.dtype)
    acc, m, l = visit.everything()

    per_row = lambda x: lax.broadcast_in_dim(x, acc.shape, [0])
    seen = l > 0.0
    inverse = jnp.where(seen, 1.0 / l, 0.0)
    lse = jnp.where(seen, m * (1.0 / LOG2E) + jnp.log(l), -jnp.inf)
    # All warps have read their queries before the output overwrites them.
    plgpu.commit_smem()
    q_tile[...] = (acc * per_row(inverse)).astype(q_ref.dtype)
    scratch.lse[warpgroup] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out_ref.at[work.batch, rows, work.head])
    plgpu.copy_smem_to_gmem(scratch.lse.at[warpgroup], lse_ref.at[work.batch, work.head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """The online softmax of one warpgroup.

    The state between items is (acc, m, l, p, row): p are the weights of the last item, whose
    product with its values (from `row` of their stage on) is still to come. It runs beside the
    scores of the next item, so the tensor cores work while the softmax does.
    """

    work: _Work
    scratch: _Scratch
    config: Config
    warpgroup: Any
    q: Any
    dtype: Any

    def slot(self, n):
        return lax.rem(n, self.config.stages)

    def stage(self, ref, n, row):
        """The rows of the n-th item's stage that this warpgroup reads."""
        if not self.work.staggered:
            return ref.at[self.slot(n)]
        row = row if isinstance(row, int) else pl.multiple_of(row, 8)
        return ref.at[self.slot(n), pl.ds(row, self.work.block_kv)]

    def everything(self):
        work = self.work
        shifted = self.warpgroup * work.shift
        state = self.first()
        state = self.loop(1, work.masked, state, work.sees_tile)
        state = self.loop(work.masked, work.listed, state, None, shifted)
        if work.column_ids is not None:
            early = work.listed + work.columns_full
            state = self.loop(work.listed, early, state, work.sees_columns, 0)
            state = self.loop(early, work.total, state, work.sees_late_columns, 0)
        acc, m, l, p, row = state
        n = work.total - 1
        values = self.stage(self.scratch.v, n, row)
        plgpu.barrier_wait(self.scratch.v_full.at[self.slot(n)])
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.scratch.v_free.at[self.slot(n)])
        return acc, m, l

    def loop(self, low, high, state, sees, row=None):
        """Visits the items of one kind; `row` is where the warpgroup's rows of a stage begin."""

        def step(n, state):
            at = self.work.window(n, self.warpgroup)[1] if row is None else row
            return self.item(n, state, sees, at)

        return lax.fori_loop(low, high, step, state)

    def softmax(self, s, m, visible):
        """New maximum, factor for what was summed so far, weights; all in log2 units."""
        scale = self.q.shape[1] ** -0.5 * LOG2E
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=1) * scale)
        # Of a row that has seen no key yet, every weight must be 0: exp2(-inf - 0).
        m_safe = m_new if visible is None else jnp.where(m_new == -jnp.inf, 0.0, m_new)
        alpha = jnp.exp2(m - m_safe)
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_safe, s.shape, [0]))
        return m_new, alpha, p

    def wait_keys(self, n):
        @pl.when(n < self.work.total)
        def _():
            plgpu.barrier_wait(self.scratch.k_full.at[self.slot(n)])

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
        m, _, p = self.softmax(s, m, self.work.sees_tile(0, self.warpgroup))
        self.wait_keys(1)
        acc = plgpu.layout_cast(acc, _WGMMA)
        return acc, m, p.sum(axis=1), p.astype(self.dtype), row

    def item(self, n, state, sees, row):
        """Scores of item n beside the value product of the item before."""
        acc, m, l, p, row_before = state
        slot, before = self.slot(n), self.slot(n - 1)
        shape = (ROWS, self.work.block_kv)
        scratch = self.scratch

        def products(refs):
            acc_ref, m_ref, l_ref, alpha_ref, p_ref = refs

            def scores_and_values(s_ref):
                plgpu.wgmma(s_ref, self.q, self.stage(scratch.k, n, row).T)
                plgpu.barrier_wait(scratch.v_full.at[before])
                plgpu.wgmma(acc_ref, p, self.stage(scratch.v, n - 1, row_before))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                plgpu.barrier_arrive(scratch.k_free.at[slot])
                visible = None if sees is None else sees(n, self.warpgroup)
                m_new, alpha, p_new = self.softmax(s, m_ref[...], visible)
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
        acc, m, l, alpha, p_new = pl.run_state(products)(
            (plgpu.ACC.init(acc), m, l, jnp.zeros_like(m), p_new)
        )
        plgpu.barrier_arrive(scratch.v_free.at[before])
        acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
        return acc, m, l, p_new.astype(self.dtype), jnp.int32(row)
