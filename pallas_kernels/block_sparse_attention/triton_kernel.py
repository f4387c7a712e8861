"""The Triton kernel itself; importing this file needs the `triton` package."""

from typing import no_type_check

# Tuples grow by `+`: Triton's language has no unpacking in a display.
# ruff: noqa: RUF005
import triton
import triton.language as tl


@triton.jit
@no_type_check
def _start_of(entries_ptr, origin, at, part, BLOCK_N: tl.constexpr):
    """First key of one part of a tile."""
    return origin + tl.load(entries_ptr + at) + part * BLOCK_N


@triton.jit
@no_type_check
def _load(ptr, real, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr, mask=real, other=0.0)
    return tl.load(ptr)


@triton.jit
@no_type_check
def _load_values(
    ptr, real, offs_n, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    SLICES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Values in SLICES of WIDTH dimensions."""
    values = ()
    for d in tl.static_range(SLICES):
        dim = d * WIDTH + tl.arange(0, WIDTH)
        inside = real[:, None] & (dim < HEAD_DIM)[None, :]
        at = offs_n[:, None] * STRIDE + dim[None, :]
        values = values + (_load(ptr + at, inside, MASKED or (d + 1) * WIDTH > HEAD_DIM),)
    return values


@triton.jit
@no_type_check
def _step(acc, m, l, scores, values, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax: adds BLOCK_N keys. SCALE turns scores into log2 units."""
    m_new = tl.maximum(m, tl.max(scores, 1) * SCALE)
    # A row that has seen no key would otherwise subtract -inf from -inf.
    top = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    weights = tl.math.exp2(scores * SCALE - top[:, None])
    alpha = tl.math.exp2(m - top)
    l = l * alpha + tl.sum(weights, 1)
    weights = weights.to(values[0].dtype)
    total = ()
    for d in tl.static_range(len(acc)):
        total = total + (tl.dot(weights, values[d], acc[d] * alpha[:, None]),)
    return total, m_new, l


@triton.jit
@no_type_check
def attention_kernel(
    q_ptr,  # [batch, q_len, heads, head_dim]
    k_ptr,  # [batch, kv_len, kv_heads, head_dim]
    v_ptr,
    entries_ptr,  # [batch, heads, capacity]
    lists_ptr,  # [batch, heads, tiles, FIELDS], the fields of plan.py
    k_columns_ptr,  # [batch, heads, padded_columns, head_dim]
    v_columns_ptr,
    ids_ptr,  # [batch, heads, padded_columns]
    bits_ptr,  # [batch, heads, tiles, HALVES * padded_columns / 32]
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
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One program: BLOCK_M rows of one query tile of one head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROW_PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    KEY_PARTS: tl.constexpr = BLOCK_KV // BLOCK_N
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    SLICES: tl.constexpr = BLOCK_D // WIDTH
    CUT: tl.constexpr = BLOCK_D > HEAD_DIM

    # Neighbours: the query heads of one key/value head, which share its keys in the cache. Then
    # query tiles from the last (of a causal list the longest) to the first.
    program = tl.program_id(0)
    member = program % GROUP
    part = tiles * ROW_PARTS - 1 - (program // GROUP) % (tiles * ROW_PARTS)
    kv = program // (GROUP * tiles * ROW_PARTS)
    batch = (kv // KV_HEADS).to(tl.int64)
    kv_head = kv % KV_HEADS
    head = kv_head * GROUP + member
    tile = part // ROW_PARTS
    half = part % ROW_PARTS * HALVES // ROW_PARTS
    batch_head = batch * HEADS + head

    fields = lists_ptr + (batch_head * tiles + tile) * FIELDS
    begin = tl.load(fields)
    count = tl.load(fields + 1)
    origin = tl.load(fields + 2) + half * tl.load(fields + 3)
    front = tl.load(fields + 4)
    tail = tl.load(fields + 5)
    first_row = tl.load(fields + 6)
    length = tl.load(fields + 7)
    entries = entries_ptr + batch_head * capacity + begin
    # Read early: the loop that begins with it waits for nothing then.
    full_start = _start_of(entries, origin, tl.minimum(front, capacity - 1 - begin), 0, BLOCK_N)

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
    every = tl.full([BLOCK_N], True, tl.int1)

    acc = ()
    for _ in tl.static_range(SLICES):
        acc = acc + (tl.zeros([BLOCK_M, WIDTH], tl.float32),)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)

    # Tiles that hold future keys, keys from `length` on or keys before 0. The plan has at least one
    # (of an empty list one that no row sees), and the maximum tells the compiler: could the loop be
    # skipped, the accumulator would have another source and ptxas would serialise every wgmma.
    for i in range(0, tl.maximum((front + tail) * KEY_PARTS, 1)):
        j = i // KEY_PARTS
        j = tl.where(j < front, j, j - front + count - tail)
        start = _start_of(entries, origin, j, i % KEY_PARTS, BLOCK_N)
        start = tl.where(count > 0, start, length)
        real = (offs_n >= -start) & (offs_n < length - start)
        at = start.to(tl.int64) * KV_STRIDE
        keys = tl.load(k_head + at + tile_k, mask=real[None, :] & in_dim[:, None], other=0.0)
        values = _load_values(v_head + at, real, offs_n, KV_STRIDE, HEAD_DIM, WIDTH, SLICES, True)
        last = tl.minimum(position, length - 1) - start
        visible = (offs_n >= -start)[None, :] & (offs_n[None, :] <= last[:, None])
        scores = tl.where(visible, tl.dot(q, keys), float("-inf"))
        acc, m, l = _step(acc, m, l, scores, values, SCALE, True)

    # Tiles that every row sees whole. The next tile's start is carried: read where it is used, it
    # would be a pipeline stage of its own and leave keys and values a single buffer.
    stop = (count - tail) * KEY_PARTS
    start = full_start
    for i in range(front * KEY_PARTS, stop):
        after = tl.minimum(i + 1, stop - 1)
        at = start.to(tl.int64) * KV_STRIDE
        keys = _load(k_head + at + tile_k, in_dim[:, None], CUT)
        values = _load_values(v_head + at, every, offs_n, KV_STRIDE, HEAD_DIM, WIDTH, SLICES, False)
        acc, m, l = _step(acc, m, l, tl.dot(q, keys), values, SCALE, False)
        start = _start_of(entries, origin, after // KEY_PARTS, after % KEY_PARTS, BLOCK_N)

    if HAS_COLUMNS:
        WORDS: tl.constexpr = BLOCK_N // 32
        columns_full = tl.load(fields + 8)
        columns_all = tl.load(fields + 9)
        k_columns = k_columns_ptr + batch_head * padded_columns * HEAD_DIM
        v_columns = v_columns_ptr + batch_head * padded_columns * HEAD_DIM
        ids = ids_ptr + batch_head * padded_columns
        bits = bits_ptr + ((batch_head * tiles + tile) * HALVES + half) * (padded_columns // 32)
        column_k = offs_d[:, None] + offs_n[None, :] * HEAD_DIM
        # Columns before every row of the query tile, then the others.
        for late in tl.static_range(2):
            first = columns_full if late else 0
            last = columns_all if late else columns_full
            for i in range(first * KEY_PARTS, last * KEY_PARTS):
                at = i * (BLOCK_N * HEAD_DIM)  # inside one head: 32 bits are enough
                keys = _load(k_columns + at + column_k, in_dim[:, None], CUT)
                values = _load_values(
                    v_columns + at, every, offs_n, HEAD_DIM, HEAD_DIM, WIDTH, SLICES, False
                )
                word = tl.load(bits + i * WORDS)
                for w in tl.static_range(1, WORDS):
                    word = tl.where(offs_n < 32 * w, word, tl.load(bits + i * WORDS + w))
                visible = (((word >> (offs_n % 32)) & 1) == 1)[None, :]
                if late:
                    key = tl.load(ids + i * BLOCK_N + offs_n)
                    visible = visible & (key[None, :] <= position[:, None])
                scores = tl.where(visible, tl.dot(q, keys), float("-inf"))
                acc, m, l = _step(acc, m, l, scores, values, SCALE, True)

    seen = l > 0.0
    total = tl.where(seen, l, 1.0)
    lse = tl.where(seen, (m + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    for d in tl.static_range(SLICES):
        dim = d * WIDTH + tl.arange(0, WIDTH)
        out = (acc[d] / total[:, None]).to(out_ptr.dtype.element_ty)
        at = offs_m[:, None] * (HEADS * HEAD_DIM) + dim[None, :]
        inside = (row < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(out_ptr + at_q + at, out, mask=inside)
    tl.store(lse_ptr + batch_head * q_len + row, lse, mask=row < q_len)
