"""Frequent words: the three most frequent of coded words, whose frequencies follow a Zeta law.

Words are six random letters, one for each 50 tokens of the length. The word of rank k stands
n k^-2 / zeta(2) times in n; dots stand in place of the first, so ranks 2 to 4 are the answers.
Prompts are worded as published (RULER, appendix D).
"""

import math
import random
import string

from experiments.ruler.draft import Draft, Request

ALPHA = 2.0
DOTS = "..."
_ZETA = math.pi**2 / 6  # zeta(2)
_TOKENS_PER_WORD = 50
_FEWEST = 100  # with fewer, the words of ranks 4 and 5 stand equally often


def frequent_words(request: Request, size: int, rest: int) -> Draft:
    """Shuffles coded words; n is 100 and twice the size, so that each size adds a word."""
    del rest
    rng = request.rng()
    words = [DOTS, *_words(request.length // _TOKENS_PER_WORD, rng)]
    number = _FEWEST + 2 * size
    entries = []
    for rank, word in enumerate(words, 1):
        entries += [word] * int(number * rank**-ALPHA / _ZETA)
    rng.shuffle(entries)
    return Draft(
        prompt="Read the following coded text and track the frequency of each coded word. Find the "
        f"three most frequently appeared coded words. {' '.join(entries)}\nQuestion: Do not "
        "provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?",
        lead="Answer: According to the coded text above, the three most frequently appeared words "
        "are:",
        answers=tuple(words[1:4]),
    )


def _words(number: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < max(number - 1, 4):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
