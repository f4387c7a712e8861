"""The sentences that fill a haystack of noise."""

import itertools

SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise_lines(sentences: int) -> list[str]:
    """Returns so many sentences, five on a line; the last line may hold fewer."""
    cycled = itertools.islice(itertools.cycle(SENTENCES), sentences)
    return [" ".join(line) for line in itertools.batched(cycled, len(SENTENCES))]
