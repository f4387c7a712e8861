"""Prompts that are longer than the model's context: the middle of the long text is left out."""

from collections.abc import Callable, Sequence

from experiments.common.errors import UserError
from experiments.infinitebench.prompts import Question

Spans = Sequence[tuple[int, int]]


def truncated_prompt(
    question: Question,
    *,
    token_spans: Callable[[str], Spans],
    count_tokens: Callable[[str, str], int],
    room: int,
) -> str:
    """Returns the prompt, without the middle of its context where the whole does not fit.

    As many tokens stay of the first half of the prompt as of the second, its lead included.
    Instruction and question stay whole.

    Args:
        question: the question.
        token_spans: where each token of a text begins and ends, in characters.
        count_tokens: how many tokens the model reads for a prompt and the answer's beginning, with
            what is put around them.
        room: tokens that prompt and lead may take.

    Raises:
        UserError: there is no room for instruction and question.
    """
    around = count_tokens("", "")
    excess = count_tokens(question.prompt, question.lead) - room
    if excess <= 0:
        return question.prompt
    before = count_tokens(question.before, "") - around
    after = count_tokens(question.after, question.lead) - around
    spans = token_spans(question.context)
    kept = len(spans) - excess
    while kept >= 0:
        head = min(max((kept + after - before) // 2, 0), kept)
        prompt = question.before + _ends(question.context, spans, head, kept - head)
        prompt += question.after
        # Joined texts have other tokens at the seams.
        excess = count_tokens(prompt, question.lead) - room
        if excess <= 0:
            return prompt
        kept -= excess
    raise UserError(
        f"instruction and question take {around + before + after} tokens, but there is room for "
        f"{room}; ask for a greater length"
    )


def _ends(text: str, spans: Spans, head: int, tail: int) -> str:
    """The text up to the end of so many tokens, and from the beginning of so many last ones."""
    first = text[: spans[head - 1][1]] if head else ""
    last = text[spans[-tail][0] :] if tail else ""
    return first + last
