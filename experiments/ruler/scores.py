"""Scores of answers, and the length up to which a model does well (RULER, section 4)."""

from collections.abc import Mapping, Sequence

from experiments.ruler.samples import tasks

# Llama2-7B (chat) at 4K tokens.
THRESHOLD = 0.856


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Returns from 0 to 1 how many of the answers a prediction holds, or whether it holds any.

    An answer is held if it occurs anywhere, upper and lower case being the same: the published
    `string_match_all`, and `string_match_part` for questions about documents, as fractions.

    Raises:
        ValueError: there is no answer, or an empty one, which any prediction would hold.
    """
    if not answers or "" in answers:
        raise ValueError(f"expected answers that are not empty, got {answers!r}")
    held = [answer.lower() in prediction.lower() for answer in answers]
    return float(any(held)) if tasks[task].match == "any" else sum(held) / len(held)


def effective_length(averages: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """Returns the largest length up to which all averages are above the threshold.

    Args:
        averages: mean score over tasks, from 0 to 1, of each length.
        threshold: what an average has to exceed.

    Returns:
        The length in tokens; None if the shortest fails.
    """
    longest = None
    for length in sorted(averages):
        if averages[length] <= threshold:
            break
        longest = length
    return longest
