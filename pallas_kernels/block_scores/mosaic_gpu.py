"""Both passes in one kernel on Hopper: statistics of the rows, then sums of their weights.

A block has 256 rows of one head; the means that any of them sees stream through shared memory
twice. Pass 1 takes `rows x means` products for each row's log-sum-exp, pass 2 the transposed ones,
so that a sum over rows is a sum along registers: see README.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.common.online_softmax import LOG2E, MASK_VALUE
from pallas_kernels.common.tiling import round_up

_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_FLAT = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

# Warpgroups that compute, each with rows of its own, and the rows of a block.
_WORKERS = 2
_ROWS = 128
_BLOCK_ROWS = _WORKERS * _ROWS
# Means of one stage, and half of it: the M of wgmma.
_MEANS = 128
_HALF = 64
_STAGES = 4


def unsupported(q: Array, means: Array) -> str | None:
    """Why these arrays cannot be served; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or means.dtype != q.dtype:
        return f"needs bfloat16 or float16, got {q.dtype} and {means.dtype}"
    if q.shape[5] not in (64, 96, 128):
        return f"needs head_dim 64, 96 or 128, got {q.shape[5]}"
    return None


def block_scores(
    q: Float[Array, "batch rows kv_heads lists members head_dim"],
    means: Float[Array, "batch kv_heads num_means head_dim"],
    *,
    past: Int[Array, " tiles"],
    real_rows: Int[Array, " batch"],
    tile_rows: int,
) -> Float[Array, "batch kv_heads lists tiles num_means"]:
    """Scores; memory is that of the result, for each member and 128 rows of a larger tile."""
    batch, rows, kv_heads, lists, members, head_dim = q.shape
    num_means, tiles = means.shape[2], past.shape[0]
    real = jnp.arange(tiles * tile_rows)[None, :] < real_rows[:, None]
    visible = jnp.where(real, jnp.repeat(past, tile_rows)[None, :], 0).astype(jnp.int32)
    q = q.reshape(batch, rows, -1, head_dim)
    width = _tile_width(tile_rows)
    if width != tile_rows:
        q = _widen(q, tiles, tile_rows, width)
        visible = _widen(visible, tiles, tile_rows, width)
    # The bulk copies see rows in groups of 8; they fill those past the end with zeros.
    q = _pad(q, 1, round_up(q.shape[1], 8))
    means = _pad(means, 2, round_up(num_means, 8))
    visible = _pad(visible, 1, round_up(visible.shape[1], _BLOCK_ROWS))
    scores = _launch(q, means, visible, min(width, _ROWS))
    parts = max(1, width // _ROWS)
    scores = scores[:, :, : tiles * parts, :num_means]
    scores = scores.reshape(batch, kv_heads, lists, members, tiles, parts, num_means)
    return jnp.sum(scores, axis=(3, 5))


def _tile_width(tile_rows: int) -> int:
    """Rows that a tile takes: 8, 16, 32, 64 or a multiple of 128."""
    if tile_rows > _ROWS:
        return round_up(tile_rows, _ROWS)
    return max(8, 1 << (tile_rows - 1).bit_length())


def _widen(x, tiles, tile_rows, width):
    """Rows [batch, tiles * tile_rows or fewer, ...] with `width` rows for each tile."""
    x = _pad(x, 1, tiles * tile_rows)
    x = _pad(x.reshape(x.shape[0], tiles, tile_rows, *x.shape[2:]), 2, width)
    return x.reshape(x.shape[0], tiles * width, *x.shape[3:])


def _pad(x, axis, size):
    """Zeros at the end of an axis; nothing is copied where none are missing."""
    missing = size - x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad) if missing else x


class _Scratch(NamedTuple):
    """Shared memory of one block."""

    q: Any
    means: Any
    lse: Any
    q_full: Any
    full: Any
    free: Any


def _launch(q, means, visible, width):
    """Scores [batch, heads, padded rows / width, padded means].

    Args:
        q: rows [batch, rows, heads, head_dim].
        means: mean keys [batch, kv_heads, num_means, head_dim].
        visible: means that each row sees [batch, padded rows], a multiple of a block's rows.
        width: rows whose weights are summed, a divisor of 128.
    """
    batch, _, heads, head_dim = q.shape
    padded_rows = visible.shape[1]
    columns = round_up(means.shape[2], _MEANS)
    swizzle = plgpu.find_swizzle(head_dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    tile = lambda *shape: plgpu.SMEM((*shape, head_dim), q.dtype, transforms=transforms)
    kernel = plgpu.kernel(
        functools.partial(_kernel, width=width, scale=head_dim**-0.5 * LOG2E),
        out_type=jax.ShapeDtypeStruct((batch, heads, padded_rows // width, columns), jnp.float32),
        # Blocks of one head side by side: those that run at a time read the same means.
        grid=(batch * heads, padded_rows // _BLOCK_ROWS),
        grid_names=("head", "block"),
        num_threads=_WORKERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "scratch": _Scratch(
                q=tile(_WORKERS, _ROWS),
                means=tile(_STAGES, _MEANS),
                lse=plgpu.SMEM((_WORKERS, _ROWS), jnp.float32),
                q_full=plgpu.Barrier(num_barriers=_WORKERS),
                full=plgpu.Barrier(num_barriers=_STAGES),
                free=plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
            )
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="block_scores",
    )
    groups = visible.reshape(batch, -1, _ROWS)
    # Of each 128 rows: stages that every row sees in full, and those that any row sees.
    least, most = jnp.min(groups, axis=2), jnp.max(groups, axis=2)
    bounds = jnp.stack([least // _MEANS, (most + _MEANS - 1) // _MEANS], axis=2)
    return kernel(q, means, visible, bounds)


def _kernel(q_ref, means_ref, visible_ref, bounds_ref, out_ref, *, scratch, width, scale):
    heads = q_ref.shape[2]
    batch, head = lax.div(lax.axis_index("head"), heads), lax.rem(lax.axis_index("head"), heads)
    kv_head = lax.div(head, heads // means_ref.shape[1])
    # Later blocks usually see more: longest first.
    block = bounds_ref.shape[1] // _WORKERS - 1 - lax.axis_index("block")
    groups = [block * _WORKERS + i for i in range(_WORKERS)]
    # Read in each branch: a number that lives across both costs a spill.
    total = lambda: functools.reduce(jnp.maximum, [bounds_ref[batch, i, 1] for i in groups])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _produce(means_ref.at[batch, kv_head], scratch, total())

    @pl.when(warpgroup < _WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        group = block * _WORKERS + warpgroup
        rows = pl.ds(pl.multiple_of(group * _ROWS, _ROWS), _ROWS)
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
        _sums(work, out_ref.at[batch, head, pl.ds(group * (_ROWS // width), _ROWS // width)], width)


def _produce(means_ref, scratch, total):
    """Copies the visible means into the ring of stages, twice."""

    @pl.loop(0, 2 * total)
    def _(n):
        slot = lax.rem(n, _STAGES)
        pl.when(n >= _STAGES)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
        stage = jnp.where(n < total, n, n - total)
        rows = pl.ds(pl.multiple_of(stage * _MEANS, _MEANS), _MEANS)
        plgpu.copy_gmem_to_smem(means_ref.at[rows], scratch.means.at[slot], scratch.full.at[slot])

    # Every completion is awaited before the block ends.
    @pl.loop(jnp.maximum(2 * total, _STAGES), 2 * total + _STAGES)
    def _(n):
        plgpu.barrier_wait(scratch.free.at[lax.rem(n, _STAGES)])


class _Work(NamedTuple):
    """What one warpgroup works on: 128 rows of a head."""

    scratch: _Scratch
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
            plgpu.barrier_wait(self.scratch.full.at[lax.rem(n, _STAGES)])

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
        return self.work.scratch.means.at[lax.rem(self.n, _STAGES)]

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
            plgpu.barrier_arrive(self.work.scratch.free.at[lax.rem(self.n, _STAGES)])
            return out, use(1, s)

        accumulator = plgpu.ACC(shape, jnp.float32)
        return pl.run_scoped(products, accumulator, accumulator)


def _halves(ref):
    return [ref.at[pl.ds(half * _HALF, _HALF)] for half in range(2)]


def _statistics(work: _Work):
    """Pass 1: writes each row's log-sum-exp, in log2 units, to shared memory; inf if it is 0."""
    shape = (_HALF, _MEANS)
    mean = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    visible = [plgpu.load(x, layout=_ROW, optimized=False) for x in _halves(work.visible)]
    per_row = lambda x: lax.broadcast_in_dim(x, shape, [0])

    def visit(stage, step, state, masked):
        def use(half, s):
            m, l = state[half]
            see = lambda x, otherwise: x
            if masked:
                seen = mean < per_row(visible[half] - stage * _MEANS)
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
    shape = (_HALF, _ROWS)
    mean = plgpu.broadcasted_iota(jnp.int32, (_HALF,), 0, layout=_ROW)
    lse = lax.broadcast_in_dim(plgpu.load(work.lse, layout=_COLUMN), shape, [1])

    def visit(stage, step, state, masked):
        # All rows of a tile see the same means, but those that count nothing.
        seen = [work.visible[i] for i in range(0, _ROWS, width)] if masked else []

        def use(half, s):
            begin = stage * _MEANS + half * _HALF
            p = jnp.exp2(s * work.scale - lse)
            if masked:
                # Rows that count nothing may hold anything, NaN as well.
                p = jnp.where(lse < jnp.inf, p, 0.0)
            columns = pl.ds(pl.multiple_of(begin, _HALF), _HALF)
            for tile in range(_ROWS // width):
                scores = p[:, tile * width : (tile + 1) * width].sum(axis=1)
                if masked:
                    scores = jnp.where(mean < seen[tile] - begin, scores, 0.0)
                out_ref[tile, columns] = scores
            return ()

        step.two_products(_halves(step.means), work.q, shape, use)
        return state

    work.loop(work.total, visit, jnp.int32(0))
    zeros = plgpu.layout_cast(jnp.zeros((_MEANS,), jnp.float32), _FLAT)

    @pl.loop(work.total, out_ref.shape[1] // _MEANS)
    def _(stage):
        columns = pl.ds(pl.multiple_of(stage * _MEANS, _MEANS), _MEANS)
        for tile in range(_ROWS // width):
            out_ref[tile, columns] = zeros
