"""Shapes and callables shared by the packages.

Shape words used in annotations:

    batch        independent prompts, right-padded to one length
    q_len        query rows of this call
    kv_len       key rows visible to this call (the whole cache under chunked prefill)
    heads        query heads
    kv_heads     key/value heads; divides heads (grouped-query attention)
    head_dim     width of one head
    layers       decoder layers
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class AttentionFn(Protocol):
    """Causal attention of one layer, passed to a model as an argument.

    An implementation is a pytree, so that new values in it never recompile. A model receives it
    with a leading `[layers]` axis on every array leaf and slices that axis while it scans its
    layers; an attention without array leaves is the same for all layers.
    """

    def __call__(
        self,
        q: Float[Array, "batch q_len heads head_dim"],
        k: Float[Array, "batch kv_len kv_heads head_dim"],
        v: Float[Array, "batch kv_len kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        q_offset: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch q_len heads head_dim"]:
        """Attends each query to the keys at its own position and before.

        Args:
            q: queries, after rotary embedding.
            k: keys, after rotary embedding.
            v: values.
            lengths: real keys of each row, `kv_len` if None. Keys from there on are never
                visible, and outputs of query rows from there on are unspecified but finite.
            q_offset: position of the first query among the keys, `kv_len - q_len` if None: query
                i sees keys up to `q_offset + i`. A scalar array, so that chunked prefill compiles
                once.

        Returns:
            The attention output, in q's dtype.
        """
        ...
