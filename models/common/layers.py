"""The modules of a pre-norm decoder, as immutable Flax NNX modules, and row-wise chunking.

Modules only hold parameters and compute; caches go in and come out as values. Shapes of parameters
are those of the checkpoint tree described in `models.common.decoder`, for one layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.common.config import DecoderConfig
from models.common.rope import apply_rope

# Tokens whose MLP and projections are computed at once: enough to fill a matrix unit, while the
# widest intermediate (Llama-3-8B: 14336 columns, two of them) stays near 250 MB in bf16 at any
# prompt length.
TOKENS_PER_CHUNK = 4096


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        def projection(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.embed_dim,
                (heads, config.head_dim),
                use_bias=config.qkv_bias,
                param_dtype=dtype,
                rngs=rngs,
            )

        self.q_proj = projection(config.num_heads)
        self.k_proj = projection(config.num_kv_heads)
        self.v_proj = projection(config.num_kv_heads)
        self.o_proj = nnx.LinearGeneral(
            (config.num_heads, config.head_dim),
            config.embed_dim,
            axis=(-2, -1),
            use_bias=config.o_bias,
            param_dtype=dtype,
            rngs=rngs,
        )


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(
                width_in, width_out, use_bias=config.mlp_bias, param_dtype=dtype, rngs=rngs
            )

        self.gate_proj = linear(config.embed_dim, config.hidden_dim)
        self.up_proj = linear(config.embed_dim, config.hidden_dim)
        self.down_proj = linear(config.hidden_dim, config.embed_dim)

    def __call__(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        """Applies the gated MLP to each row."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One pre-norm layer, in the two halves that lie before and after attention."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.input_norm = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = rms_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch s embed"],
        cos: Float[Array, "batch s half"],
        sin: Float[Array, "batch s half"],
        attend: Callable[..., tuple[Float[Array, "batch s heads head_dim"], Any]],
        *,
        parts: int = 1,
    ) -> tuple[Float[Array, "batch s embed"], Any]:
        """Computes the layer around `attend(q, k, v) -> (out, anything)`.

        Everything but `attend` works on rows, `TOKENS_PER_CHUNK` at a time, so that its memory does
        not grow with the length times the MLP's width. Of rows that lie on `parts` devices, each
        takes so many of its own.

        Returns:
            The new residual stream and what `attend` returned beside its output.
        """
        batch, length, _ = x.shape
        rows = max(1, TOKENS_PER_CHUNK // batch)
        config = self.config

        def heads(count: int) -> Float[Array, "batch s heads head_dim"]:
            return jnp.zeros((batch, length, count, config.head_dim), x.dtype)

        empty = (heads(config.num_heads), heads(config.num_kv_heads), heads(config.num_kv_heads))
        with jax.named_scope("qkv"):
            q, k, v = map_rows(
                lambda _, xs: self._project(*xs), empty, (x, cos, sin), rows=rows, parts=parts
            )
        with jax.named_scope("attention"):
            out, anything = attend(q, k, v)
        with jax.named_scope("mlp"):
            x = map_rows(self._finish, x, out, rows=rows, parts=parts)
        return x, anything

    def _project(self, x, cos, sin):
        x = self.input_norm(x)
        q, k, v = self.attention.q_proj(x), self.attention.k_proj(x), self.attention.v_proj(x)
        interleaved = self.config.rope.interleaved
        return (
            apply_rope(q, cos, sin, interleaved=interleaved),
            apply_rope(k, cos, sin, interleaved=interleaved),
            v,
        )

    def _finish(self, x, out):
        x = x + self.attention.o_proj(out)
        return x + self.mlp(self.post_attention_norm(x))


class Ends(nnx.Module):
    """What lies before and after the layers: embedding, final norm and LM head."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.embed_dim, param_dtype=dtype, rngs=rngs)
        self.final_norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                config.embed_dim,
                config.vocab_size,
                use_bias=False,
                param_dtype=dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def logits(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows vocab"]:
        """Computes fp32 logits of the residual stream's rows."""
        x = self.final_norm(x)
        if hasattr(self, "lm_head"):
            return self.lm_head(x)
        table = self.embed.embedding[...]
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def rms_norm(config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Returns an RMSNorm of the residual stream: fp32 statistics, output in the input's dtype."""
    return nnx.RMSNorm(config.embed_dim, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)


def map_rows(
    fn: Callable[[Any, Any], Any], carry: Any, inputs: Any, *, rows: int, parts: int = 1
) -> Any:
    """Applies a row-wise function to at most `rows` rows (axis 1) at a time.

    Args:
        fn: takes the same rows of `carry` and of `inputs` and returns the new rows of `carry`; each
            output row must depend on its own row only.
        carry: a pytree of `[batch, s, ...]` arrays, replaced slice by slice, in place under jit.
        inputs: a pytree of `[batch, s, ...]` arrays that are only read.
        rows: rows of a slice. The last `s % rows` rows make a shorter slice.
        parts: equal runs of rows that lie on devices of their own: slices are taken of each.

    Returns:
        The new `carry`, equal to `fn(carry, inputs)`.
    """
    if parts > 1:
        split = lambda x: x.reshape(x.shape[0], parts, -1, *x.shape[2:])
        of_part = functools.partial(map_rows, fn, rows=rows)
        arrays = jax.tree.map(split, (carry, inputs))
        carry = jax.vmap(of_part, in_axes=1, out_axes=1)(*arrays)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), carry)
    length = jax.tree.leaves(carry)[0].shape[1]
    if length <= rows:
        return fn(carry, inputs)

    def apply(start: Any, size: int, carry: Any) -> Any:
        def take(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)

        new = fn(jax.tree.map(take, carry), jax.tree.map(take, inputs))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1),
            carry,
            new,
        )

    chunks, tail = divmod(length, rows)
    carry = jax.lax.fori_loop(0, chunks, lambda i, c: apply(i * rows, rows, c), carry)
    return apply(chunks * rows, tail, carry) if tail else carry
