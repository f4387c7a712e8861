"""The op on Hopper: one warp-specialised Pallas (Mosaic GPU) kernel for all heads of a layer."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import plan as planning
from pallas_kernels.block_sparse_attention.config import COMPUTE_WARPGROUPS, ROWS, Config, default_config
from pallas_kernels.block_sparse_attention.index import BlockSparseIndex
from pallas_kernels.block_sparse_attention.plan import Plan
from pallas_kernels.common.online_softmax import LOG2E
from pallas_kernels.common.tiling import round_up

_WGMMA = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def block_sparse_attention(q, k, v, index: BlockSparseIndex, *, lengths, q_offset, config: Config | None = None):
    batch, q_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    if config is None:
        config = default_config(head_dim, index.block_kv)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x
    q, k, v = map(pad, (q, k, v))
    plan = planning.make_plan(index, kv_len=kv_len, lengths=lengths, q_offset=q_offset)
    columns = planning.gather_columns(k, v, index) if plan.num_columns else None
    out, lse = _launch(q, k, v, index.entries, plan, columns, config, index.block_kv)
    return out[:, :q_len], lse[:, :, :q_len]


def _launch(q, k, v, entries, plan: Plan, columns, config: Config, block_kv: int, interpret=None):
    batch, q_len, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    tiles = plan.lists.shape[2]
    dtype = q.dtype
    body = functools.partial(
        _kernel, config=config, group=group, kv_heads=kv_heads, tiles=tiles, block_kv=block_kv,
        has_columns=columns is not None, kv_len=k.shape[1], scale=head_dim**-0.5 * LOG2E,
    )
    swizzle = plgpu.find_swizzle(head_dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=transforms)
    stages = config.stages
    scratch = dict(
        q_smem=tile(COMPUTE_WARPGROUPS, ROWS, head_dim),
        k_smem=tile(stages, block_kv, head_dim),
        v_smem=tile(stages, block_kv, head_dim),
        lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
    )
    grid = (q.shape[0] * kv_heads, tiles, group) if config.group_inner else (q.shape[0] * kv_heads, group, tiles)
    names = ("kv", "tile", "member") if config.group_inner else ("kv", "member", "tile")
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * COMPUTE_WARPGROUPS * ROWS), jnp.float32),
        ],
        grid=grid,
        grid_names=names,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="block_sparse_attention",
        **({} if interpret is None else {"interpret": interpret}),
    )
    if columns is None:
        return kernel(q, k, v, entries, plan.lists)
    return kernel(q, k, v, entries, plan.lists, *columns, plan.column_ids, plan.column_bits)


def _kernel(
    q_ref, k_ref, v_ref, entries_ref, lists_ref, *rest,
    config, group, kv_heads, tiles, block_kv, has_columns, kv_len, scale,
    q_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn,
):
    if has_columns:
        kc_ref, vc_ref, ids_ref, bits_ref, out_ref, lse_ref = rest
    else:
        out_ref, lse_ref = rest
        kc_ref = vc_ref = ids_ref = bits_ref = None
    head_dim = q_ref.shape[-1]
    stages = config.stages
    kv = lax.axis_index("kv")
    batch, kv_head = lax.div(kv, kv_heads), lax.rem(kv, kv_heads)
    head = kv_head * group + lax.axis_index("member")
    tile = tiles - 1 - lax.axis_index("tile")
    wg = lax.axis_index("wg")

    begin, count, origin, front, tail, first_row, length, columns_full, columns_all = (
        lists_ref[batch, head, tile, field] for field in range(planning.FIELDS)
    )
    masked = front + tail
    listed = jnp.maximum(count, 1)
    total = listed + columns_all if has_columns else listed
    slot = lambda n: lax.rem(n, stages)

    def start_of(n):
        """Where the n-th visited tile starts: the masked ones first, then the full ones."""
        at = jnp.where(n < front, n, jnp.where(n < masked, count - 1, n - tail))
        start = origin + entries_ref[batch, head, begin + at]
        return jnp.where(count > 0, start, kv_len)

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def produce():
        plgpu.set_max_registers(24, action="decrease")

        def load(n, keys, values):
            s = slot(n)

            @pl.when(n >= stages)
            def _():
                plgpu.barrier_wait(k_free.at[s])

            plgpu.copy_gmem_to_smem(keys, k_smem.at[s], k_full.at[s])

            @pl.when(n >= stages)
            def _():
                plgpu.barrier_wait(v_free.at[s])

            plgpu.copy_gmem_to_smem(values, v_smem.at[s], v_full.at[s])

        @pl.loop(0, listed)
        def _(n):
            rows = pl.ds(pl.multiple_of(jnp.maximum(start_of(n), 0), 8), block_kv)
            load(n, k_ref.at[batch, rows, kv_head], v_ref.at[batch, rows, kv_head])

        if has_columns:

            @pl.loop(0, columns_all)
            def _(c):
                rows = pl.ds(pl.multiple_of(c * block_kv, block_kv), block_kv)
                load(listed + c, kc_ref.at[batch, head, rows], vc_ref.at[batch, head, rows])

        # Every completion is awaited before the block ends.
        @pl.loop(jnp.maximum(total, stages), total + stages)
        def _(n):
            plgpu.barrier_wait(k_free.at[slot(n)])
            plgpu.barrier_wait(v_free.at[slot(n)])

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        q_tile = q_smem.at[wg]
        row = first_row + wg * ROWS
        q_rows = pl.ds(pl.multiple_of(tile * (COMPUTE_WARPGROUPS * ROWS) + wg * ROWS, ROWS), ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, q_rows, head], q_tile, q_full.at[wg])

        shape = (ROWS, block_kv)
        iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA)
        over_keys = lambda x, like: lax.broadcast_in_dim(x, like, [0])
        my_turn = lambda: plgpu.barrier_wait(turn.at[wg]) if config.alternate else None
        pass_turn = lambda: plgpu.barrier_arrive(turn.at[1 - wg]) if config.alternate else None

        # What a row may see of the n-th item; None: all of it.
        def see_tile(n):
            start = start_of(n)
            first = jnp.maximum(start, 0)
            keys = jnp.minimum(start + block_kv, length) - first
            return (iota(1) < keys) & (iota(1) - iota(0) <= row - first)

        def bit_set(n):
            base = (n - listed) * (block_kv // 32)
            words = [bits_ref[batch, head, tile, base + i] for i in range(block_kv // 32)]
            word = jnp.full(shape, words[0])
            for i in range(1, len(words)):
                word = jnp.where(iota(1) < 32 * i, word, words[i])
            word = plgpu.layout_cast(word, _WGMMA)
            return lax.shift_right_logical(word, iota(1) & 31) & 1 == 1

        def see_edge_columns(n):
            at = pl.ds(pl.multiple_of((n - listed) * block_kv, block_kv), block_kv)
            ids = plgpu.load(ids_ref.at[batch, head, at], layout=_COLUMN, optimized=False)
            return bit_set(n) & (lax.broadcast_in_dim(ids, shape, [1]) - iota(0) <= row)

        def softmax(s, m, visible):
            if visible is None:
                m_new = jnp.maximum(m, s.max(axis=1) * scale)
                m_safe = m_new
            else:
                s = jnp.where(visible, s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * scale)
                m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            alpha = jnp.exp2(m - m_safe)
            p = jnp.exp2(s * scale - over_keys(m_safe, shape))
            return m_new, alpha, p

        def scores(n):
            """Scores of the n-th item on their own: the first item, and without overlap."""
            s = slot(n)

            def product(acc):
                plgpu.wgmma(acc, q_tile, k_smem.at[s].T)
                pass_turn()
                return acc[...]

            plgpu.barrier_wait(k_full.at[s])
            my_turn()
            out = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[s])
            return out

        def wait_keys(n):
            @pl.when(n < total)
            def _():
                plgpu.barrier_wait(k_full.at[slot(n)])

        def overlapped(n, carry, visible_of):
            acc, m, l, p = carry
            s, before = slot(n), slot(n - 1)

            def products(refs):
                acc_ref, m_ref, l_ref, alpha_ref, p_ref = refs

                def inner(scores_ref):
                    my_turn()
                    plgpu.wgmma(scores_ref, q_tile, k_smem.at[s].T)
                    plgpu.barrier_wait(v_full.at[before])
                    plgpu.wgmma(acc_ref, p, v_smem.at[before])
                    pass_turn()
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[s])
                    visible = visible_of(n) if visible_of else None
                    m_new, alpha, p_new = softmax(scores, m_ref[...], visible)
                    l_new = l_ref[...] * alpha + p_new.sum(axis=1)
                    # Without this the compiler sinks the softmax below the wait for the values.
                    m_ref[...], l_ref[...], alpha_ref[...], p_ref[...] = lax.optimization_barrier(
                        (m_new, l_new, alpha, p_new)
                    )
                    wait_keys(n + 1)

                pl.run_scoped(inner, plgpu.ACC(shape, jnp.float32))

            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _WGMMA)
            acc, m, l, alpha, p_new = pl.run_state(products)(
                (plgpu.ACC.init(acc), m, l, jnp.zeros_like(m), zero)
            )
            plgpu.barrier_arrive(v_free.at[before])
            acc *= over_keys(alpha, acc.shape)
            return acc, m, l, p_new.astype(q_ref.dtype)

        def value_product(n, acc, p, then=lambda: None):
            s = slot(n)

            def product(acc_ref):
                plgpu.wgmma(acc_ref, p, v_smem.at[s])
                then()

            plgpu.barrier_wait(v_full.at[s])
            acc = pl.run_state(product)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[s])
            return acc

        def alternating(n, carry, visible_of):
            acc, m, l = carry
            s = scores(n)
            m, alpha, p = softmax(s, m, visible_of(n) if visible_of else None)
            l = l * alpha + p.sum(axis=1)
            acc *= over_keys(alpha, acc.shape)
            p16 = p.astype(q_ref.dtype)
            acc, l, m, p16 = lax.optimization_barrier((acc, l, m, p16))
            plgpu.barrier_wait(v_full.at[slot(n)])
            my_turn()

            def product(acc_ref):
                plgpu.wgmma(acc_ref, p16, v_smem.at[slot(n)])
                pass_turn()

            acc = pl.run_state(product)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot(n)])
            return acc, m, l

        if config.alternate:
            @pl.when(wg == 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

        zeros = lambda shape, layout, fill=0.0: plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)
        acc = zeros((ROWS, head_dim), _WGMMA)
        m = zeros((ROWS,), _ROW, -jnp.inf)
        l = zeros((ROWS,), _ROW)
        plgpu.barrier_wait(q_full.at[wg])
        visit = overlapped if config.overlap else alternating
        loop = lambda low, high, carry, see: lax.fori_loop(low, high, functools.partial(visit, visible_of=see), carry)
        if config.overlap:
            m, alpha, p = softmax(scores(0), m, see_tile(0))
            carry = (acc, m, p.sum(axis=1), p.astype(q_ref.dtype))
            wait_keys(1)
            carry = loop(1, masked, carry, see_tile)
        else:
            carry = loop(0, masked, (acc, m, l), see_tile)
        carry = loop(masked, listed, carry, None)
        if has_columns:
            carry = loop(listed, listed + columns_full, carry, bit_set)
            carry = loop(listed + columns_full, total, carry, see_edge_columns)
        if config.overlap:
            acc, m, l, p = carry
            acc = value_product(total - 1, acc, p)
        else:
            acc, m, l = carry

        if config.alternate:
            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(turn.at[0])

        seen = l > 0.0
        inverse = jnp.where(seen, 1.0 / l, 0.0)
        lse = jnp.where(seen, m * (1 / LOG2E) + jnp.log(l), -jnp.inf)
        plgpu.commit_smem()
        q_tile[...] = (acc * over_keys(inverse, acc.shape)).astype(q_ref.dtype)
        lse_smem[wg] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out_ref.at[batch, q_rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[batch, head, q_rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
