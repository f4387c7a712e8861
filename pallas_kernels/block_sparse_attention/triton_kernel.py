"""The Triton kernel itself; importing this file needs the `triton` package."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _start_of(entries_ptr, origin, at, part, BLOCK_N: tl.constexpr):
    """First key of one part of a tile."""
    return origin + tl.load(entries_ptr + at) + part * BLOCK_N


@triton.jit
@no_type_check
def _step(acc, m, l, q, keys, values, visible, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax: adds BLOCK_N keys. SCALE turns scores into log2 units."""
    scores = tl.dot(q, keys)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * SCALE)
    # A row that has seen no key would otherwise subtract -inf from -inf.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    weights = tl.math.exp2(scores * SCALE - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    l = l * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None])
    return acc, m_new, l


@triton.jit
@no_type_check
def attention_kernel(
    q_ptr,  # [batch, q_len, heads, head_dim]
    k_ptr,  # [batch, kv_len, kv_heads, head_dim]
    v_ptr,
    entries_ptr,  # [batch, heads, capacity]
    lists_ptr,  # [batch, heads, tiles, FIELDS]
    order_ptr,  # [batch * kv_heads]
    k_columns_ptr,  # [batch, heads, padded_columns, head_dim]
    v_columns_ptr,
    ids_ptr,  # [batch, heads, padded_columns]
    bits_ptr,  # [batch, heads, tiles, padded_columns / 32]
    q_len,
    kv_len,
    tiles,
    capacity,
    padded_columns,
    out_ptr,  # [batch, q_len, heads, head_dim]
    lse_ptr,  # [batch, heads, q_len]
    SCALE: tl.constexpr,  # with log2 e in it
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One program: BLOCK_M rows of one query tile of one head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROW_PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    KEY_PARTS: tl.constexpr = BLOCK_KV // BLOCK_N
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM

    # Neighbours: the query heads of one key/value head, which share its keys in the cache. Then
    # query tiles from the last (of a causal list the longest) to the first.
    program = tl.program_id(0)
    member = program % GROUP
    part = (program // GROUP) % (tiles * ROW_PARTS)
    part = tiles * ROW_PARTS - 1 - part
    kv = tl.load(order_ptr + program // (GROUP * tiles * ROW_PARTS))
    batch = (kv // KV_HEADS).to(tl.int64)
    kv_head = kv % KV_HEADS
    head = kv_head * GROUP + member
    tile = part // ROW_PARTS
    batch_head = batch * HEADS + head

    fields = lists_ptr + (batch_head * tiles + tile) * FIELDS
    begin = tl.load(fields)
    count = tl.load(fields + 1)
    origin = tl.load(fields + 2)
    front = tl.load(fields + 3)
    tail = tl.load(fields + 4)
    first_row = tl.load(fields + 5)
    length = tl.load(fields + 6)
    columns = tl.load(fields + 7)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_dim = offs_d < HEAD_DIM
    row = part * BLOCK_M + offs_m
    position = first_row + (part % ROW_PARTS) * BLOCK_M + offs_m

    at_q = (batch * q_len + part * BLOCK_M) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    tile_q = offs_m[:, None] * (HEADS * HEAD_DIM) + offs_d[None, :]
    real_q = (row < q_len)[:, None] & in_dim[None, :]
    if BLOCK_D == HEAD_DIM:
        real_q = (row < q_len)[:, None]
    q = tl.load(q_ptr + at_q + tile_q, mask=real_q, other=0.0)

    # 64-bit offsets once per tile, 32-bit offsets inside it.
    head_kv = batch * kv_len * KV_STRIDE + kv_head * HEAD_DIM
    k_head = k_ptr + head_kv
    v_head = v_ptr + head_kv
    tile_k = offs_d[:, None] + offs_n[None, :] * KV_STRIDE
    tile_v = offs_n[:, None] * KV_STRIDE + offs_d[None, :]
    entries = entries_ptr + batch_head * capacity + begin

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)

    # Tiles that hold future keys, keys from `length` on or keys before 0.
    for i in range(0, (front + tail) * KEY_PARTS):
        j = i // KEY_PARTS
        j = tl.where(j < front, j, j - front + count - tail)
        start = _start_of(entries, origin, j, i % KEY_PARTS, BLOCK_N)
        key = start + offs_n
        real = (key >= 0) & (key < length)
        at = start.to(tl.int64) * KV_STRIDE
        keys = tl.load(k_head + at + tile_k, mask=real[None, :] & in_dim[:, None], other=0.0)
        values = tl.load(v_head + at + tile_v, mask=real[:, None] & in_dim[None, :], other=0.0)
        visible = real[None, :] & (key[None, :] <= position[:, None])
        acc, m, l = _step(acc, m, l, q, keys, values, visible, SCALE, True)

    # Tiles that every row sees whole.
    stop = (count - tail) * KEY_PARTS
    start = _start_of(entries, origin, tl.minimum(front, capacity - 1 - begin), 0, BLOCK_N)
    for i in range(front * KEY_PARTS, stop):
        after = tl.minimum(i + 1, stop - 1)
        at = start.to(tl.int64) * KV_STRIDE
        if BLOCK_D == HEAD_DIM:
            keys = tl.load(k_head + at + tile_k)
            values = tl.load(v_head + at + tile_v)
        else:
            keys = tl.load(k_head + at + tile_k, mask=in_dim[:, None], other=0.0)
            values = tl.load(v_head + at + tile_v, mask=in_dim[None, :], other=0.0)
        acc, m, l = _step(acc, m, l, q, keys, values, True, SCALE, False)
        start = _start_of(entries, origin, after // KEY_PARTS, after % KEY_PARTS, BLOCK_N)

    if HAS_COLUMNS:
        k_columns = k_columns_ptr + batch_head * padded_columns * HEAD_DIM
        v_columns = v_columns_ptr + batch_head * padded_columns * HEAD_DIM
        ids = ids_ptr + batch_head * padded_columns
        bits = bits_ptr + (batch_head * tiles + tile) * (padded_columns // 32)
        column_k = offs_d[:, None] + offs_n[None, :] * HEAD_DIM
        column_v = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
        for i in range(0, tl.cdiv(columns, BLOCK_N)):
            slot = i * BLOCK_N + offs_n
            used = (tl.load(bits + slot // 32) >> (slot % 32)) & 1
            key = tl.load(ids + slot)
            at = i.to(tl.int64) * (BLOCK_N * HEAD_DIM)
            if BLOCK_D == HEAD_DIM:
                keys = tl.load(k_columns + at + column_k)
                values = tl.load(v_columns + at + column_v)
            else:
                keys = tl.load(k_columns + at + column_k, mask=in_dim[:, None], other=0.0)
                values = tl.load(v_columns + at + column_v, mask=in_dim[None, :], other=0.0)
            visible = (used == 1)[None, :] & (key[None, :] <= position[:, None])
            acc, m, l = _step(acc, m, l, q, keys, values, visible, SCALE, True)

    seen = l > 0.0
    total = tl.where(seen, l, 1.0)
    out = acc / total[:, None]
    lse = tl.where(seen, (m + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(out_ptr + at_q + tile_q, out.to(out_ptr.dtype.element_ty), mask=real_q)
    tl.store(lse_ptr + batch_head * q_len + row, lse, mask=row < q_len)
