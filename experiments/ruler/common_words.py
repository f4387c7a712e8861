"""Common words: ten words stand more often than all others in a numbered list.

The ten stand 30 times each, the others 3 times; below 4,096 tokens 6 times and once. An example
with its answer comes before: 40 words, 10 times and 3 times; below 4,096 tokens 20 words, 3 times
and once. Prompts are worded as published (RULER, appendix D). Our own: words are those of
`words.py` and those of the text that have at least four letters, all lower case, and are no
function words; the last of the others may stand less often, so that the list fits.
"""

import functools
import random
import re

from experiments.ruler.draft import Draft, Request
from experiments.ruler.words import ADJECTIVES, FUNCTION_WORDS, NOUNS, VERBS

COMMON = 10
_SHORT = 4096


def common_words(request: Request, size: int, rest: int) -> Draft:
    """Lists the common words and `size` entries of others."""
    del rest
    rng = request.rng()
    words = list(_pool(request.text))
    rng.shuffle(words)  # all of them: drafts of all sizes begin with the same words
    if request.length < _SHORT:
        example = _draft(words[:20], 3, 1, 10, rng)
        draft = _draft(words[20:], 6, 1, size, rng)
    else:
        example = _draft(words[:40], 10, 3, 90, rng)
        draft = _draft(words[40:], 30, 3, size, rng)
    shown = f"{example.text} {_numbered(list(example.answers))}"
    return Draft(prompt=f"{shown}\n{draft.prompt}", lead=draft.lead, answers=draft.answers)


def _draft(words: list[str], often: int, seldom: int, others: int, rng: random.Random) -> Draft:
    """A list of the first ten words, each often, and others, each seldom, up to so many entries."""
    common, uncommon = words[:COMMON], words[COMMON : COMMON + -(-others // seldom)]
    entries = common * often + [word for word in uncommon for _ in range(seldom)][:others]
    rng.shuffle(entries)
    return Draft(
        prompt="Below is a numbered list of words. In these words, some appear more often than "
        f"others. Memorize the ones that appear most often.\n{_numbered(entries)}\n"
        f"Question: What are the {COMMON} most common words in the above list?",
        lead=f"Answer: The top {COMMON} words that appear most often in the list are:",
        answers=tuple(common),
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@functools.lru_cache(maxsize=1)
def _pool(text: str) -> tuple[str, ...]:
    found = re.findall(r"(?<![\w'\u2019-])[a-z]{4,}(?![\w'\u2019-])", text)
    return tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS, *found} - FUNCTION_WORDS))
