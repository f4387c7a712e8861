"""A few numbers of a prefill's result, by which rows of one and of several devices are compared."""

from typing import Any

import numpy as np
from jaxtyping import Float

_LIKELIEST = 5

Digest = dict[str, Any]


def digest_of(logits: Float[np.ndarray, " vocab"]) -> Digest:
    """The likeliest tokens with their logits, and the standard deviation of all logits."""
    logits = np.asarray(logits, np.float32)
    tokens = np.argsort(-logits, kind="stable")[:_LIKELIEST]
    top = [round(float(logit), 6) for logit in logits[tokens]]
    return {"tokens": tokens.tolist(), "logits": top, "deviation": round(float(logits.std()), 6)}


def agreement(one: Digest, other: Digest) -> tuple[bool, float | None]:
    """Whether the likeliest token is the same, and how far shared likeliest ones are apart.

    Returns:
        The largest difference of a logit of the tokens that both name, over the deviation of all
        logits of the first; None if they name none in common.
    """
    logits = [dict(zip(x["tokens"], x["logits"], strict=True)) for x in (one, other)]
    shared = logits[0].keys() & logits[1].keys()
    apart = max((abs(logits[0][x] - logits[1][x]) for x in shared), default=None)
    scaled = None if apart is None else apart / max(one["deviation"], 1e-9)
    return one["tokens"][0] == other["tokens"][0], scaled
