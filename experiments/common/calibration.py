"""The attentions of a run's methods, those that need a calibration prompt among them.

A calibration prompt is Python source of the standard library, which no evaluation asks about, and
for questions a fact hidden in it and the question for the fact. It fills the length of the prompts
that it stands for, because lines beyond a shorter one are lost and those of a shorter one do not
reach the end of a longer one.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import minference_jax as mj
from experiments.common.capacities import share_capacities
from experiments.common.errors import UserError
from experiments.common.methods import Method
from experiments.common.prompts import Prompt, code_prompt, fit_prompt, needle_prompt
from experiments.common.session import tokens_of
from models import Model
from models.common.static import static_attention

# Far from the seeds of other prompts that are made of this source.
_FIRST_SEED = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A prompt whose lines stand for those of other prompts.

    Attributes:
        length: tokens of the prompts that it stands for.
        text: what it is made of.
        ids: its tokens.
    """

    length: int
    text: str
    ids: Int[np.ndarray, "1 s"]

    def about(self) -> dict[str, Any]:
        """What a record says of it."""
        sha256 = hashlib.sha256(self.ids.tobytes()).hexdigest()
        tokens = self.ids.shape[1]
        return {"length": self.length, "text": self.text, "tokens": tokens, "sha256": sha256}


class Attentions:
    """The attention of every method, with common capacities; static ones are estimated once."""

    def __init__(self, methods: Sequence[Method], model: Model, *, chat: bool) -> None:
        """Makes what needs no prompt.

        Args:
            methods: the methods.
            model: the model.
            chat: put calibration prompts that ask something into the chat template.

        Raises:
            UserError: a method is for a model of another size.
        """
        sizes = model.config.num_layers, model.config.num_heads
        made = share_capacities([method.attention(*sizes) for method in methods])
        self._made = dict(zip(methods, made, strict=True))
        self._model = model
        self._prompt = functools.cache(functools.partial(_prompt, model, chat))
        self._static: dict[tuple[Method, int, bool], mj.StaticAttention] = {}

    def at(self, method: Method, length: int, *, asks: bool) -> Any:
        """The attention of a method for prompts of a length.

        Args:
            method: one of those given.
            length: tokens of the prompts.
            asks: they ask something.

        Raises:
            UserError: no calibration prompt is so short.
        """
        if method.calibrated is None:
            return self._made[method]
        key = method, length, asks
        if key not in self._static:
            prompt = self._prompt(method.calibrated, length, asks)
            self._static[key] = static_attention(
                self._model.params, jnp.asarray(prompt.ids), config=self._model.config,
                sparse=self._made[method],
            )  # fmt: skip
        return self._static[key]

    def calibrations(
        self, method: Method, lengths: Iterable[int], *, asks: bool
    ) -> list[dict[str, Any]]:
        """What a record says of a method's calibration prompts; nothing if it needs none.

        Raises:
            UserError: no calibration prompt is so short.
        """
        if (seed := method.calibrated) is None:
            return []
        return [self._prompt(seed, length, asks).about() for length in sorted(set(lengths))]


def _prompt(model: Model, chat: bool, seed: int, length: int, asks: bool) -> Calibration:
    drawn = _FIRST_SEED + seed

    def build(words: int) -> Prompt:
        if not asks:
            return code_prompt(words, seed=drawn)
        return needle_prompt(source, words, seed=drawn, depth=0.5)

    ids = functools.partial(tokens_of, model, chat=chat and asks)
    source = code_prompt(length, seed=drawn).text if asks else ""
    try:
        prompt = fit_prompt(build, lambda text: len(ids(text)), length)
    except UserError as error:
        raise UserError(f"no calibration prompt for {length} tokens: {error}") from error
    text = f"Python's library{', a number in it and the question for it' if asks else ''}"
    return Calibration(
        length=length, text=f"{text}, seed {seed}", ids=np.asarray([ids(prompt.text)], np.int32)
    )
