"""Needles in a haystack: eight tasks that differ in haystack, needles and what is asked.

A needle says that a key has a value. The haystack is noise, a text, or other needles. In a text,
needles stand between sentences at depths out of 40 that are evenly spread from start to end;
elsewhere they are lines at any place.

Prompts are worded as published (RULER, appendix D), in the singular where one value is asked for,
as in the authors' samples.
Our own: the words of keys; any text, from its beginning, in place of the essays; whole sentences of
noise in its last line; among needles, sentences of noise at the end, which fill what another needle
would overshoot.
"""

import dataclasses
import random
import re
import uuid
from typing import Literal

from experiments.ruler.draft import Draft, Request
from experiments.ruler.noise import noise_lines
from experiments.ruler.words import ADJECTIVES, NOUNS

Kind = Literal["word", "number", "uuid"]

DEPTHS = tuple(round(100 * place / 39) for place in range(40))  # per cent
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d\u2019)])\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """A builder of needle tasks: `(request, size, rest) -> draft`.

    Sizes are sentences of noise, words of the text, or needles; `rest` is sentences of noise after
    the last needle of a haystack of needles.

    Attributes:
        haystack: what the needles lie in.
        key: kind of the keys.
        value: kind of the values.
        keys: keys hidden.
        values: values of each key.
        queries: keys asked for.
    """

    haystack: Literal["noise", "text", "needles"] = "text"
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, request: Request, size: int, rest: int) -> Draft:
        """Hides the needles of a request in a haystack of a size."""
        rng = request.rng()
        table = self._table(rng)
        needles = [self._needle(key, value) for key in table for value in table[key]]
        rng.shuffle(needles)
        asked = rng.sample(list(table), self.queries)
        answers = tuple(value for key in asked for value in table[key])
        match self.haystack:
            case "text":
                context = hide_in_text(needles, request.text, size, rng)
            case "noise":
                context = _hide_in_lines(needles, noise_lines(size), rng)
            case "needles":
                others = [self._other(table, rng) for _ in range(size)]
                lines = [_hide_in_lines(needles, others, rng), *noise_lines(rest)]
                context = "\n".join(lines)
        return self._ask(context, asked, answers)

    def _table(self, rng: random.Random) -> dict[str, list[str]]:
        table = {}
        while len(table) < self.keys:
            table[_draw(self.key, rng)] = [_draw(self.value, rng) for _ in range(self.values)]
        return table

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value}s for {key} is: {value}."

    def _other(self, table: dict[str, list[str]], rng: random.Random) -> str:
        """A needle of a key that is not asked for."""
        while (key := _draw(self.key, rng)) in table:
            pass
        return self._needle(key, _draw(self.value, rng))

    def _ask(self, context: str, asked: list[str], answers: tuple[str, ...]) -> Draft:
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        if len(answers) == 1:
            kind, opening, question, verb = (
                self.value,
                f"A special magic {self.value} is",
                "What is",
                "is",
            )
        else:
            kind = f"{self.value}s"
            opening, question, verb = f"Some special magic {kind} are", "What are all", "are"
        about = f"the special magic {kind} for {query} mentioned in the provided text"
        return Draft(
            prompt=f"{opening} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{context}\n{question} {about}?",
            lead=f"{about[0].upper()}{about[1:]} {verb}",
            answers=answers,
        )


def _draw(kind: Kind, rng: random.Random) -> str:
    match kind:
        case "word":
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        case "number":
            return str(rng.randrange(10**6, 10**7))
        case "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def hide_in_text(needles: list[str], text: str, words: int, rng: random.Random) -> str:
    """Returns the first words of a text, with the needles in this order between its sentences."""
    passage = " ".join(text.split(maxsplit=words)[:words])
    sentences = _SENTENCE_ENDS.split(passage)
    depths = sorted(rng.sample(DEPTHS, len(needles)), reverse=True)
    places = [len(sentences) * depth // 100 for depth in depths]
    for place, needle in zip(places, needles, strict=True):  # from the end: places stay right
        sentences.insert(place, needle)
    return " ".join(sentences)


def _hide_in_lines(needles: list[str], lines: list[str], rng: random.Random) -> str:
    places = sorted(rng.sample(range(len(lines) + 1), len(needles)), reverse=True)
    lines = list(lines)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)
