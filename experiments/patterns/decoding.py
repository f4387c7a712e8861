"""Keys chosen anew at each decoding step, against keys chosen once after the prompt."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.patterns.read import AnyArray, over_heads, row_blocks, weights_of
from minference_jax.index.lines import LAST_Q
from minference_jax.index.select import top_k_mask


class Decoded(NamedTuple):
    """For every head, decoding step and k.

    Attributes:
        dynamic: attention inside the k keys of the prompt that this step weighs most, and all keys
            after the prompt.
        static: the same with the k keys that the prompt's last queries weigh most in sum.
        overlap: share of the former k keys that are among the latter.
    """

    dynamic: Float[AnyArray, "heads steps ks"]
    static: Float[AnyArray, "heads steps ks"]
    overlap: Float[AnyArray, "heads steps ks"]


@functools.partial(jax.jit, static_argnames=("steps", "ks", "last_q"))
def decoding_kept(
    q: Float[Array, "1 length heads head_dim"],
    k: Float[Array, "1 length kv_heads head_dim"],
    *,
    steps: int,
    ks: tuple[int, ...],
    last_q: int = LAST_Q,
) -> Decoded:
    """What decoding keeps, on a text whose last `steps` tokens are taken as decoded.

    Args:
        q: queries of the whole text.
        k: keys of the whole text.
        steps: tokens after the prompt.
        ks: how many keys of the prompt are kept, at most its length.
        last_q: queries at the end of the prompt that choose the static keys.
    """
    length = k.shape[1]
    prompt = length - steps
    blocks = row_blocks(jnp.arange(prompt, length), length)
    before = jnp.arange(max(0, prompt - last_q), prompt)

    def one_head(q, k):
        once = jnp.sum(weights_of(q, k, before)[:, :prompt], axis=0)

        def one_block(block):
            weights = weights_of(q, k, block)
            new, old = jnp.sum(weights[:, prompt:], axis=1), weights[:, :prompt]

            def one_size(size):
                dynamic = jax.vmap(top_k_mask, in_axes=(0, None))(old, size)
                static = top_k_mask(once, size)[None, :]
                inside = lambda chosen: new + jnp.sum(jnp.where(chosen, old, 0.0), axis=1)
                return Decoded(
                    inside(dynamic), inside(static), jnp.sum(dynamic & static, axis=1) / size
                )

            return jax.lax.map(one_size, jnp.array(ks))

        kept = jax.lax.map(one_block, blocks)  # [blocks, ks, block]
        flat = lambda x: jnp.moveaxis(x, 1, 2).reshape(-1, len(ks))[:steps]
        return jax.tree.map(flat, kept)

    return over_heads(one_head, (q, k))
