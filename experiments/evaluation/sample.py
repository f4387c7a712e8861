"""One question to a model, and the answers that count as right."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its answers.

    Attributes:
        name: distinguishes the sample within its run.
        task: what is asked; scores are means over a task's samples.
        length: tokens that the prompt was made for.
        prompt: the user's message.
        lead: how the answer begins, put into the model's mouth.
        answers: right answers.
        max_new_tokens: tokens that an answer may take.
    """

    name: str
    task: str
    length: int
    prompt: str
    lead: str = ""
    answers: tuple[str, ...]
    max_new_tokens: int
