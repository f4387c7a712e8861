"""How far a candidate is from dense attention, as sums that add up over prompts."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# output_error: squared difference of the outputs, as a share of the dense outputs' squared norm
#   (the paper's choice, up to the norm, which it does not name); 0 is best.
# residual_error: squared length of what the head's error adds to the residual stream, through its
#   slice of the output projection, over that of the stream before the layer; mean over rows, 0 is
#   best. It is in one unit for all heads of all layers, so that one budget can be spent on them.
# recall: attention mass inside the visited set, mean over rows (the released search); 1 is best.
# log_recall: mean logarithm of that mass, the difference of log-sum-exps: a row that loses nearly
#   everything weighs more than many that lose a little; 0 is best.
# count: share of output elements that are off by more than 5e-3 (`search_pattern_v2`); 0 is best.
Objective = Literal["output_error", "residual_error", "recall", "log_recall", "count"]

_FAR_OFF = 5e-3


class Differences(NamedTuple):
    """Sums over the counted rows of a batch of prompts, for each head."""

    squared: Float[Array, "*any heads"]
    dense_squared: Float[Array, "*any heads"]
    lost_mass: Float[Array, "*any heads"]
    lost_log_mass: Float[Array, "*any heads"]
    far_off: Float[Array, "*any heads"]
    elements: Float[Array, "*any heads"]
    rows: Float[Array, "*any heads"]
    residual: Float[Array, "*any heads"] | None


def differences(
    out: Float[Array, "batch length heads head_dim"],
    lse: Float[Array, "batch heads length"],
    dense_out: Float[Array, "batch length heads head_dim"],
    dense_lse: Float[Array, "batch heads length"],
    counted: Bool[Array, "batch length"],
    projection_gram: Float[Array, "heads head_dim head_dim"] | None = None,
    row_weight: Float[Array, "batch length"] | None = None,
) -> Differences:
    """Compares sparse with dense attention; O(length) memory.

    The mass inside the visited set is exp(lse - dense_lse), row by row: no matrix is needed.

    Args:
        out: outputs of the sparse attention.
        lse: its log-sum-exps of the scaled scores.
        dense_out: outputs of dense attention.
        dense_lse: its log-sum-exps.
        counted: the rows that count.
        projection_gram: see `Calibration`; None leaves `residual` out.
        row_weight: likewise.
    """
    rows = counted[:, :, None]
    out, dense_out = out.astype(jnp.float32), dense_out.astype(jnp.float32)
    delta = out - dense_out
    per_row = lambda x: jnp.sum(jnp.where(rows, jnp.sum(x, axis=3), 0.0), axis=(0, 1))
    # Rounding may put the mass inside above the whole.
    log_mass = jnp.where(counted[:, None, :], jnp.minimum(lse - dense_lse, 0.0), 0.0)

    def residual(gram, weight):
        moved = jnp.einsum("blhd,hde->blhe", delta, gram, precision="highest")
        return per_row(moved * delta * weight[:, :, None, None])

    number = jnp.broadcast_to(jnp.sum(counted).astype(jnp.float32), out.shape[2:3])
    return Differences(
        squared=per_row(delta**2),
        dense_squared=per_row(dense_out**2),
        lost_mass=jnp.sum(-jnp.expm1(log_mass), axis=(0, 2)),
        lost_log_mass=jnp.sum(-log_mass, axis=(0, 2)),
        far_off=per_row((jnp.abs(delta) > _FAR_OFF).astype(jnp.float32)),
        elements=number * out.shape[3],
        rows=number,
        residual=None if projection_gram is None else residual(projection_gram, row_weight),
    )
