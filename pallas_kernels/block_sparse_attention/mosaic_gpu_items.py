"""The items that one query tile visits, in their order, and what its rows see of each."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.config import ROWS

_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Work:
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
        """Items in all: key tiles, then tiles of gathered columns."""
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
        """Rows (axis 0) or keys (axis 1) of a warpgroup's item, counted from 0."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, self.block_kv), axis, layout=_WGMMA)

    def rows(self, warpgroup):
        """Positions of a warpgroup's rows."""
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_WGMMA.reduce(1))
        return row + (self.first_row + warpgroup * ROWS)

    def hide_keys(self, n, warpgroup, s):
        """Scores of a key tile, -inf for what a row does not see."""
        first, _ = self.window(n, warpgroup)
        end = self.start(n) + warpgroup * self.shift + self.block_kv
        keys = jnp.minimum(jnp.minimum(end, self.length), self.rows(warpgroup) + 1) - first
        seen = self.iota(1) < lax.broadcast_in_dim(keys, (ROWS, self.block_kv), [0])
        return jnp.where(seen, s, -jnp.inf)

    def hide_columns(self, n, warpgroup, s):
        """Scores of a tile of columns before every row: most tiles are seen whole."""
        bits = self.bits(n, warpgroup)
        whole = functools.reduce(lax.bitwise_and, bits) == -1
        hide = lambda s: jnp.where(self.sees(bits), s, -jnp.inf)
        return lax.cond(whole, lambda s: s, hide, s)

    def bits(self, n, warpgroup):
        """Words of the bits of a tile of columns."""
        words = self.block_kv // 32
        base = (n - self.listed) * words
        if self.staggered:
            base += warpgroup * (self.column_ids.shape[2] // 32)
        return [self.column_bits[self.batch, self.head, self.tile, base + i] for i in range(words)]

    def sees(self, bits):
        """Mask of a tile of columns from its bits."""
        word = jnp.full((ROWS, self.block_kv), bits[0])
        for i in range(1, len(bits)):
            word = jnp.where(self.iota(1) < 32 * i, word, bits[i])
        word = plgpu.layout_cast(word, _WGMMA)
        # A thread's columns differ in other bits than 1 and 2: one shift by these serves them all.
        column = self.iota(1)
        shared = lax.shift_right_logical(word, column & 6)
        return lax.shift_right_logical(shared, column & 25) & 1 == 1

    def hide_late_columns(self, n, warpgroup, s):
        """Scores of a tile of columns some of which lie after some rows."""
        at = pl.ds(pl.multiple_of((n - self.listed) * self.block_kv, self.block_kv), self.block_kv)
        ids = self.column_ids.at[self.batch, self.head, at]
        ids = plgpu.load(ids, layout=_WGMMA.reduce(0), optimized=False)
        ids = lax.broadcast_in_dim(ids, (ROWS, self.block_kv), [1])
        rows = lax.broadcast_in_dim(self.rows(warpgroup), (ROWS, self.block_kv), [0])
        return jnp.where(self.sees(self.bits(n, warpgroup)) & (ids <= rows), s, -jnp.inf)
