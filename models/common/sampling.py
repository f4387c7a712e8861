"""How the next token is chosen from its logits: the likeliest, or at random."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: samples among the k most likely tokens only.
        top_p: samples among the smallest set of most likely tokens whose probability reaches p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when a value is out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A sampling whose numbers are arrays, so that others run the same program.

    Attributes:
        temperature: of the sampling.
        top_k: of the sampling, the whole vocabulary if None.
        top_p: of the sampling, more than 1 if all tokens may be chosen.
        greedy: the temperature is 0 (static).
        filtered: there is a top-k or a top-p (static).
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})


def choice_of(sampling: Sampling, vocab_size: int) -> Choice:
    """Returns the arrays of a sampling."""
    return Choice(
        temperature=jnp.asarray(sampling.temperature, jnp.float32),
        top_k=jnp.asarray(sampling.top_k or vocab_size, jnp.int32),
        # Rounding may bring the cumulated probability to 1 before the last token.
        top_p=jnp.asarray(2.0 if sampling.top_p in (None, 1.0) else sampling.top_p, jnp.float32),
        greedy=sampling.temperature == 0,
        filtered=sampling.top_k is not None or sampling.top_p is not None,
    )


def choose_tokens(
    logits: Float[Array, "batch vocab"], choice: Choice, key: Array
) -> Int[Array, " batch"]:
    """Chooses one token of each row; `key` is not read when greedy."""
    if choice.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / choice.temperature
    if not choice.filtered:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    place = jax.random.categorical(key, jnp.where(_kept(ranked, choice), ranked, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _kept(ranked: Float[Array, "batch vocab"], choice: Choice) -> Bool[Array, "batch vocab"]:
    """Which of the descending logits may be sampled: top-k first, top-p of what is left."""
    within_k = (jnp.arange(ranked.shape[-1]) < choice.top_k)[None, :]
    probability = jax.nn.softmax(jnp.where(within_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    return within_k & (before < choice.top_p)
