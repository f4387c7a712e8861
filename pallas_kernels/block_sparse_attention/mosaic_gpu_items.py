"""The items that one query tile visits, in their order, and what its rows see of each."""

import dataclasses
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
        ids = plgpu.load(ids, layout=_WGMMA.reduce(0), optimized=False)
        ids = lax.broadcast_in_dim(ids, (ROWS, self.block_kv), [1])
        rows = lax.broadcast_in_dim(self.rows(warpgroup), (ROWS, self.block_kv), [0])
        return self.sees_columns(n, warpgroup) & (ids <= rows)
