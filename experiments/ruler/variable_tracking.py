"""Variable tracking: which variables hold a value, through a chain of assignments in noise.

One chain of four hops, so five variables; an example with its answer comes before the question.
Prompts are worded as published (RULER, appendix D); the example is drawn anew for each sample.
"""

import itertools
import random
import string

from experiments.ruler.draft import Draft, Request
from experiments.ruler.noise import SENTENCES, noise_lines

HOPS = 4
_EXAMPLE_LINES = 10
_FEWEST_LINES = HOPS + 1  # noise stands between all assignments


def variable_tracking(request: Request, size: int, rest: int) -> Draft:
    """Hides a chain among sentences of noise, `size` more than the fewest that keep it apart."""
    del rest
    rng = request.rng()
    example_value, value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    example = _draft(example_value, 3, _EXAMPLE_LINES * len(SENTENCES), rng)
    draft = _draft(value, 5, _FEWEST_LINES * len(SENTENCES) + size, rng)
    shown = f"{example.text} {' '.join(example.answers)}"
    return Draft(prompt=f"{shown}\n\n{draft.prompt}", lead=draft.lead, answers=draft.answers)


def _draft(value: str, letters: int, sentences: int, rng: random.Random) -> Draft:
    names = _names(letters, rng)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
    lines = noise_lines(sentences)
    places = sorted(rng.sample(range(len(lines)), len(chain)))
    for before, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + before, assignment)
    context = "\n".join(lines)
    return Draft(
        prompt="Memorize and track the chain(s) of variable assignment hidden in the following "
        f"text.\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in "
        "the text above.",
        lead="Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        answers=tuple(names),
    )


def _names(letters: int, rng: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)
