"""The callable that decides what stays of a layer's keys and values, and what it returns."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.common.checks import check_attention_shapes, check_lengths


class KVScales(NamedTuple):
    """What the stored keys and values are to be multiplied by, in each channel, float32.

    A cache of all layers has a leading `[layers]` axis here.
    """

    keys: Float[Array, "*layers batch kv_heads head_dim"]
    values: Float[Array, "*layers batch kv_heads head_dim"]


class KeptKV(NamedTuple):
    """Keys and values of one layer that stay for decoding, in the order of their positions.

    Attributes:
        keys: each key/value head's own choice, after rotary embedding at its true position; zeros
            from `stored` on.
        values: as `keys`.
        stored: how many are kept of each row, the same number for all its heads.
        scales: of keys and values kept in 8 bits, else None.
    """

    keys: Num[Array, "batch slots kv_heads head_dim"]
    values: Num[Array, "batch slots kv_heads head_dim"]
    stored: Int[Array, " batch"]
    scales: KVScales | None = None


@runtime_checkable
class KVCompression(Protocol):
    """What one layer keeps of a whole prompt.

    As an `AttentionFn`, an implementation is a pytree whose array leaves have a leading `[layers]`
    axis in front of a model, which slices it.
    """

    @property
    def capacity(self) -> int:
        """The most keys that a layer keeps of a row (static)."""
        ...

    @property
    def window(self) -> int:
        """How many of each row's last queries it reads (static)."""
        ...

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_start: Int[Array, " batch"] | None = None,
    ) -> KeptKV:
        """Chooses among a prompt's keys, once for all query heads that share them.

        Args:
            q: queries of the prompt, after rotary embedding.
            k: keys, after rotary embedding.
            v: values.
            lengths: real tokens of each row, all of them if None.
            q_start: position of each row's first query, where `q` is only the last `window` real
                queries; the whole prompt if None.

        Returns:
            `min(capacity, kv_len)` slots. A row that fits its budget is kept whole, as it is.

        Raises:
            ValueError: shapes disagree.
        """
        ...


def check_prompt_shapes(
    q: Array, k: Array, v: Array, lengths: Array | None, q_start: Array | None
) -> None:
    """Raises ValueError unless these are queries, keys and values of one whole prompt."""
    check_attention_shapes(q, k, v)
    check_lengths(lengths, q.shape[0], k.shape[1])
    if q_start is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"`q` has {q.shape[1]} rows and `k` {k.shape[1]}: what is kept is chosen once, after "
            "the whole prompt, from its queries and keys"
        )


def gather_kept(
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    positions: Int[Array, "batch kv_heads slots"],
    stored: Int[Array, " batch"],
) -> KeptKV:
    """Reads the chosen keys and values; positions of `kv_len` or more are slots left empty."""
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)
    over_rows = jax.vmap(jax.vmap(take, in_axes=(1, 0), out_axes=1))
    return KeptKV(over_rows(k, positions), over_rows(v, positions), stored)
