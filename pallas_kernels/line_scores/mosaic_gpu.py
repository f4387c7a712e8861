"""The two passes on Hopper: each key/value head's keys stream through shared memory once a pass.

Pass 1 takes running maxima and normalisers of `q k^T` (rows are queries) over a chunk of keys; XLA
combines the chunks. Pass 2 takes the transposed product (rows are keys), so that a column sum is a
sum along a row of registers, and writes each tile's weights to shared memory, where the diagonals
are read as rows that start one element later each time: see README.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.common.online_softmax import LOG2E, MASK_VALUE
from pallas_kernels.common.tiling import cdiv

_WGMMA = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_FLAT = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

# Queries of one product (wgmma's M in pass 1); fewer are padded.
ROWS = 64
# Keys of one block, and of one tile in each pass.
_CHUNK = 2048
_STATISTICS_TILE = 128
_SUMS_TILE = 64
# A row of weights in shared memory: 64 weights between margins of 64 zeros, for the windows of 128
# that slide over them; and 8 words more than a multiple of 32, so that the rows that a warp stores
# at a time fall into different banks.
_MARGIN = 64
_PITCH = 200


def unsupported(q: Array, k: Array) -> str | None:
    """Why these arrays cannot be served; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"needs bfloat16 or float16, got {q.dtype} and {k.dtype}"
    if q.shape[3] not in (64, 96, 128, 256):
        return f"needs head_dim 64, 96, 128 or 256, got {q.shape[3]}"
    if q.shape[1] > ROWS:
        return f"takes at most {ROWS} queries, got {q.shape[1]}"
    return None


def line_scores(
    q: Float[Array, "batch last_q heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    *,
    first: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch heads kv_len"], Float[Array, "batch heads kv_len"]]:
    """Column sums and diagonal sums; memory is one float for each head, key and sum."""
    batch, last_q, heads, _ = q.shape
    kv_len = k.shape[1]
    position = first[:, None] + jnp.arange(ROWS)[None, :]
    real = (position < lengths[:, None]) & (jnp.arange(ROWS) < last_q)[None, :]
    q = jnp.pad(q, ((0, 0), (0, ROWS - last_q), (0, 0), (0, 0)))
    q = jnp.where(real[:, :, None, None], q, 0)
    if kv_len % 8:
        k = jnp.pad(k, ((0, 0), (0, -kv_len % 8), (0, 0), (0, 0)))
    first = first.astype(jnp.int32)
    m, l = _statistics(q, k, first)
    m, l = _combine(m, l)
    lse = jnp.where(real[:, None, :] & (l > 0.0), m + jnp.log2(jnp.maximum(l, 1e-30)), jnp.inf)
    vertical, diagonal = _sums(q, k, first, lse)
    vertical = vertical.reshape(batch, heads, -1)[:, :, :kv_len]
    return vertical, _by_distance(diagonal, first, kv_len)


def _combine(m, l):
    """Statistics of all chunks from [batch, heads, chunks, rows], as a binary tree from the left.

    Chunks after a prompt's end add zeros, whatever their number, so padding changes no bit.
    """
    chunks = m.shape[2]
    extra = (1 << (chunks - 1).bit_length()) - chunks
    pad = ((0, 0), (0, 0), (0, extra), (0, 0))
    m = jnp.pad(m, pad, constant_values=MASK_VALUE)
    l = jnp.pad(l, pad)
    top = jnp.max(m, axis=2)
    l = l * jnp.exp2(m - top[:, :, None, :])
    while l.shape[2] > 1:
        l = l[:, :, 0::2] + l[:, :, 1::2]
    return top, l[:, :, 0]


def _by_distance(diagonal, first, kv_len):
    """Distance sums [batch, heads, kv_len] from the diagonal sums of chunks, last chunk first.

    Entry e of chunk c holds the sum over key - row = (c + 1) * _CHUNK - 1 - e, with rows counted
    from `first`; a chunk's last 64 entries continue in the chunk before it.
    """
    batch, heads, chunks, _ = diagonal.shape
    pad = lambda x, chunk, entry: jnp.pad(x, ((0, 0), (0, 0), chunk, entry))
    body = pad(diagonal[..., :_CHUNK], (0, 1), (0, 0))
    tail = pad(diagonal[..., _CHUNK:], (1, 0), (0, _CHUNK - _SUMS_TILE))
    whole = (body + tail).reshape(batch, heads, (chunks + 1) * _CHUNK)
    whole = jnp.pad(whole, ((0, 0), (0, 0), (0, kv_len)))
    take = lambda x, at: lax.dynamic_slice_in_dim(x, at, kv_len, axis=1)
    return jax.vmap(take)(whole, chunks * _CHUNK - 1 - first)


def _warpgroups(group: int, head_dim: int) -> int:
    """Warpgroups that compute, each with a query head of its own."""
    return 2 if group % 2 == 0 and head_dim <= 128 else 1


def _launch(body, q, k, out_type, scratch, tile, name, operands):
    """Runs `body` for every (key/value head, chunk, part of its query heads)."""
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    workers = _warpgroups(group, head_dim)
    swizzle = plgpu.find_swizzle(head_dim * 16)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    stages = 3 if head_dim <= 128 else 2
    kernel = plgpu.kernel(
        functools.partial(
            body, workers=workers, group=group, kv_heads=kv_heads, tile=tile, stages=stages,
            scale=head_dim**-0.5 * LOG2E,
        ),
        out_type=out_type,
        grid=(batch * kv_heads, cdiv(k.shape[1], _CHUNK), group // workers),
        grid_names=("kv", "chunk", "member"),
        num_threads=workers + 1,
        thread_name="wg",
        scratch_types=dict(
            q_smem=plgpu.SMEM((workers, ROWS, head_dim), q.dtype, transforms=transforms),
            k_smem=plgpu.SMEM((stages, tile, head_dim), q.dtype, transforms=transforms),
            q_full=plgpu.Barrier(num_barriers=workers),
            k_full=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            **scratch(workers),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=name,
    )  # fmt: skip
    return kernel(q, k, *operands)


def _stream(
    q_ref, k_ref, first_ref, consume,
    *, workers, group, kv_heads, tile, stages, q_smem, k_smem, q_full, k_full, k_free,
):  # fmt: skip
    """Feeds a chunk's key tiles to the warpgroups; `consume(where, loop)` is what each does.

    `loop(visit, carry)` calls `visit(masked, n, slot, carry)` for each tile with a visible key,
    `masked` where not every row sees all of it.
    """
    kv = lax.axis_index("kv")
    batch, kv_head = lax.div(kv, kv_heads), lax.rem(kv, kv_heads)
    chunk = lax.axis_index("chunk")
    wg = lax.axis_index("wg")
    start = chunk * _CHUNK
    first = first_ref[batch]
    tiles = jnp.minimum(_CHUNK, k_ref.shape[1] - start + tile - 1) // tile
    total = jnp.clip(lax.div(first + ROWS - start + tile - 1, tile), 0, tiles)
    full = jnp.clip(lax.div(first + 1 - start, tile), 0, total)

    @pl.when(wg == workers)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, total)
        def _(n):
            slot = lax.rem(n, stages)

            @pl.when(n >= stages)
            def _():
                plgpu.barrier_wait(k_free.at[slot])

            rows = pl.ds(pl.multiple_of(start + n * tile, tile), tile)
            plgpu.copy_gmem_to_smem(
                k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_full.at[slot]
            )

        # Every completion is awaited before the block ends.
        @pl.loop(jnp.maximum(total, stages), total + stages)
        def _(n):
            plgpu.barrier_wait(k_free.at[lax.rem(n, stages)])

    @pl.when(wg < workers)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        head = kv_head * group + lax.axis_index("member") * workers + wg
        plgpu.copy_gmem_to_smem(q_ref.at[batch, :, head], q_smem.at[wg], q_full.at[wg])
        plgpu.barrier_wait(q_full.at[wg])

        def loop(visit, carry):
            def one(n, carry, masked):
                slot = lax.rem(n, stages)
                plgpu.barrier_wait(k_full.at[slot])
                release = lambda: plgpu.barrier_arrive(k_free.at[slot])
                return visit(n, k_smem.at[slot], release, carry, masked)

            carry = lax.fori_loop(0, full, functools.partial(one, masked=False), carry)
            return lax.fori_loop(full, total, functools.partial(one, masked=True), carry)

        consume((batch, head, chunk, wg, first - start), loop)


def _product(a, b, shape, release):
    """A @ b^T of two tiles in shared memory."""

    def product(acc):
        plgpu.wgmma(acc, a, b.T)
        return acc[...]

    out = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    release()
    return out


def _statistics(q, k, first):
    """Maxima and normalisers of each chunk, log2 units: two [batch, heads, chunks, 64]."""
    shape = (q.shape[0], q.shape[2], cdiv(k.shape[1], _CHUNK), ROWS)
    return _launch(
        _statistics_kernel, q, k, [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
        lambda workers: {"out_smem": plgpu.SMEM((workers, 2, ROWS), jnp.float32)},
        _STATISTICS_TILE, "line_scores_statistics", (first,),
    )  # fmt: skip


def _statistics_kernel(q_ref, k_ref, first_ref, m_ref, l_ref, *, out_smem, scale, **stream):
    shape = (ROWS, stream["tile"])
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA)

    def consume(where, loop):
        batch, head, chunk, wg, first = where

        def visit(n, keys, release, carry, masked):
            m, l = carry
            s = _product(stream["q_smem"].at[wg], keys, shape, release)
            see = lambda x, otherwise: x
            if masked:
                visible = iota(1) - iota(0) <= first - n * stream["tile"]
                see = lambda x, otherwise: jnp.where(visible, x, otherwise)
            m_new = jnp.maximum(m, see(s, MASK_VALUE).max(axis=1) * scale)
            p = see(jnp.exp2(s * scale - lax.broadcast_in_dim(m_new, shape, [0])), 0.0)
            return m_new, l * jnp.exp2(m - m_new) + p.sum(axis=1)

        full = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), _ROW)
        m, l = loop(visit, (full(MASK_VALUE), full(0.0)))
        out_smem[wg, 0] = m
        out_smem[wg, 1] = l
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[wg, 0], m_ref.at[batch, head, chunk])
        plgpu.copy_smem_to_gmem(out_smem.at[wg, 1], l_ref.at[batch, head, chunk])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _stream(q_ref, k_ref, first_ref, consume, **stream)


def _sums(q, k, first, lse):
    """Column sums [batch, heads, chunks, _CHUNK] and diagonal sums, 64 more for each chunk."""
    batch, _, heads, _ = q.shape
    shape = (batch, heads, cdiv(k.shape[1], _CHUNK))
    tiles = _CHUNK // _SUMS_TILE

    def scratch(workers):
        return {
            "weight_smem": plgpu.SMEM((workers, _SUMS_TILE, _PITCH), jnp.float32),
            "vertical_smem": plgpu.SMEM((workers, tiles, _SUMS_TILE), jnp.float32),
            "diagonal_smem": plgpu.SMEM((workers, _CHUNK + 128), jnp.float32),
        }

    vertical, diagonal = _launch(
        _sums_kernel, q, k,
        [
            jax.ShapeDtypeStruct((*shape, tiles, _SUMS_TILE), jnp.float32),
            jax.ShapeDtypeStruct((*shape, _CHUNK + 128), jnp.float32),
        ],
        scratch, _SUMS_TILE, "line_scores_sums", (first, lse),
    )  # fmt: skip
    return vertical, diagonal[..., : _CHUNK + _SUMS_TILE]


def _sums_kernel(
    q_ref, k_ref, first_ref, lse_ref, vertical_ref, diagonal_ref,
    *, weight_smem, vertical_smem, diagonal_smem, scale, **stream,
):  # fmt: skip
    tile, tiles = stream["tile"], _CHUNK // stream["tile"]
    shape = (tile, ROWS)
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA)
    zeros = lambda size, layout: plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)

    last = diagonal_ref.shape[2] - 1

    def consume(where, loop):
        batch, head, chunk, wg, first = where
        weights, diagonal = weight_smem.at[wg], diagonal_smem.at[wg]

        @pl.loop(0, tile)
        def _(c):
            weights[c, pl.ds(0, 128)] = zeros(128, _FLAT)
            weights[c, pl.ds(_PITCH - 128, 128)] = zeros(128, _FLAT)

        @pl.loop(0, tiles)
        def _(n):
            vertical_smem[wg, n] = zeros(tile, _ROW)

        @pl.loop(0, diagonal.shape[0] // 128)
        def _(i):
            diagonal[pl.ds(i * 128, 128)] = zeros(128, _FLAT)

        lse = plgpu.load(lse_ref.at[batch, head], layout=_COLUMN, optimized=False)

        def visit(n, keys, release, carry, masked):
            s = _product(keys, stream["q_smem"].at[wg], shape, release)
            p = jnp.exp2(s * scale - lax.broadcast_in_dim(lse, shape, [1]))
            if masked:
                p = jnp.where(iota(0) - iota(1) <= first - n * tile, p, 0.0)
            vertical_smem[wg, n] = p.sum(axis=1)
            weights[pl.ds(0, tile), pl.ds(_MARGIN, ROWS)] = p
            # Word t of key c's window is the weight of row t + c - 63: key - row = 63 - t.
            begin = pl.multiple_of((tiles - 1 - n) * tile, tile)
            window = diagonal.at[pl.ds(begin, 128)]
            total = plgpu.load(window, layout=_FLAT)
            for c in range(tile):
                total += plgpu.load(weights.at[c, pl.ds(c + 1, 128)], layout=_FLAT)
            window[...] = total
            return carry

        loop(visit, jnp.int32(0))

        @pl.loop(0, diagonal.shape[0] // 128)
        def _(i):
            part = pl.ds(i * 128, 128)
            diagonal_ref[batch, head, last - chunk, part] = plgpu.load(
                diagonal.at[part], layout=_FLAT
            )

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(vertical_smem.at[wg], vertical_ref.at[batch, head, chunk])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _stream(q_ref, k_ref, first_ref, consume, **stream)
