"""Cases of the attention op that every implementation for a GPU must get right."""

import dataclasses
import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import BlockSparseIndex
from pallas_kernels.block_sparse_attention import workloads as make
from pallas_kernels.block_sparse_attention.index import resolve_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: its shapes, and the index it visits."""

    name: str
    index: Callable[..., BlockSparseIndex]
    options: dict = dataclasses.field(default_factory=dict)
    batch: int = 1
    q_len: int
    kv_len: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    block_kv: int = 128
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] | None = None

    def build(self):
        """q, k, v, index, lengths, q_offset."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        normal = lambda n, h: jnp.asarray(
            rng.standard_normal((self.batch, n, h, self.head_dim)), self.dtype
        )
        q = normal(self.q_len, self.heads)
        k, v = normal(self.kv_len, self.kv_heads), normal(self.kv_len, self.kv_heads)
        index = self.index(
            self.batch, self.heads, self.q_len, self.kv_len, block_kv=self.block_kv, **self.options
        )
        lengths = None if self.lengths is None else jnp.asarray(self.lengths)
        return q, k, v, index, *resolve_lengths(self.batch, self.q_len, self.kv_len, lengths, None)


def empty_index(batch, heads, q_len, kv_len, *, block_kv):
    """No query tile visits anything."""
    index = make.dense_index(batch, heads, q_len, kv_len, block_kv=block_kv)
    return dataclasses.replace(index, count=jnp.zeros_like(index.count))


def columns_only_index(batch, heads, q_len, kv_len, *, block_kv):
    """No tiles; the first and the last key, and some between, as columns."""
    chosen = np.unique(np.array([0, kv_len // 3, kv_len // 2, kv_len - 1]))
    nothing = np.zeros(0, int)
    return make.lines_index(
        [chosen] * heads, [nothing] * heads, batch, q_len, kv_len, block_kv=block_kv
    )


def mixed_index(batch, heads, q_len, kv_len, *, block_kv, staggered=False):
    """Heads as unlike as can be: dense, diagonal only, lines, a far slash without the diagonal."""
    rng = np.random.default_rng(0)
    distances = [np.arange(kv_len), np.zeros(1, int), np.array([0, 9, kv_len // 2, kv_len - 1])]
    distances.append(np.array([kv_len // 3]))
    columns = [np.zeros(0, int), np.arange(min(40, kv_len)), rng.choice(kv_len, kv_len // 4, False)]
    columns.append(np.array([kv_len - 1]))
    pick = lambda x: [x[h % len(x)] for h in range(heads)]
    return make.lines_index(
        pick(columns), pick(distances), batch, q_len, kv_len, block_kv=block_kv, staggered=staggered
    )


_LINES = {"vertical": 60, "slash": 40, "spread": "clustered"}
_DENSE, _VS = make.dense_index, make.vertical_slash_index

CASES = [
    *(Case(name=f"dense-{n}", index=_DENSE, q_len=n, kv_len=n) for n in (1, 63, 100, 257, 4097)),
    *(
        Case(name=f"mixed-{n}-{s}", index=mixed_index, options={"staggered": s}, q_len=n, kv_len=n)
        for n in (1, 63, 100, 257, 4097)
        for s in (False, True)
    ),
    *(
        Case(
            name=f"gqa-{g}", index=_VS, options=_LINES, q_len=300, kv_len=700, heads=h,
            kv_heads=h // g,
        )
        for g, h in ((1, 2), (4, 8), (7, 14), (8, 8))
    ),
    *(
        Case(
            name=f"head-dim-{d}-{b}-{s}-{dtype}", index=_VS, options=_LINES | {"staggered": s},
            q_len=515, kv_len=515, head_dim=d, block_kv=b, dtype=dtype,
        )
        for d, b in ((64, 64), (64, 128), (96, 128), (128, 64), (256, 64))
        for s in (False, True)
        for dtype in ("bfloat16", "float16")
        if not (s and d == 256)
    ),
    Case(name="empty", index=empty_index, q_len=200, kv_len=200),
    Case(name="columns-only", index=columns_only_index, q_len=300, kv_len=300),
    Case(
        name="row-lengths", index=mixed_index, options={"staggered": True}, batch=3, q_len=400,
        kv_len=1000, lengths=(1000, 700, 601),
    ),
    Case(name="chunk", index=mixed_index, q_len=129, kv_len=3001),
    Case(name="chunk-dense", index=_DENSE, q_len=256, kv_len=2053),
    Case(
        name="blocks", index=make.block_sparse_index, options={"blocks": 5}, q_len=2100, kv_len=2100
    ),
    Case(
        name="scattered", index=_VS, options=_LINES | {"spread": "scattered", "staggered": True},
        q_len=2049, kv_len=4097,
    ),
]  # fmt: skip
