"""A conversation in pieces that are read one after the other onto a cache."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from experiments.common.errors import UserError, reported_as_user_error
from models import Model
from models.common.tokenizer import Tokenizer

Mode = Literal["multi_turn", "shared_context"]


class Turn(NamedTuple):
    """A question about a context.

    Attributes:
        question: the user's message.
        lead: how the answer begins, put into the model's mouth.
        answer: what follows it in a right answer.
    """

    question: str
    lead: str
    answer: str


def cut(
    model: Model, context: str, turns: Sequence[Turn], *, mode: Mode, chat: bool
) -> list[list[int]]:
    """Returns the tokens of each piece, which are encoded apart from each other.

    `multi_turn`: the context with the first question, then for each further turn the right answer
    to the question before, and the question. `shared_context`: the context alone, then each
    question, all of which follow the context.

    Args:
        model: its tokenizer is used.
        context: what is asked about; ends in white space, so that no token spans its end.
        turns: questions; the last one's answer is not read.
        mode: how they are asked.
        chat: put the conversation into the chat template, if there is one.

    Raises:
        UserError: the chat template changes what was said before.
    """
    tokenizer = model.tokenizer
    templated = chat and tokenizer.has_chat_template
    text = _templated if templated else _plain
    if mode == "multi_turn":
        whole = [text(tokenizer, context, turns[: n + 1]) for n in range(len(turns))]
        texts = list(_differences(whole))
    else:
        alone = [text(tokenizer, context, [turn]) for turn in turns]
        start, found, _ = alone[0].partition(context)
        texts = [start + found, *(_rest(one, start + context) for one in alone)]
    return [
        tokenizer.encode(piece, add_special_tokens=number == 0 and not templated)
        for number, piece in enumerate(texts)
    ]


def _templated(tokenizer: Tokenizer, context: str, turns: Sequence[Turn]) -> str:
    """All that is read up to the last turn's answer."""
    messages = []
    for number, turn in enumerate(turns):
        question = turn.question if number else context + turn.question
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{turn.lead.lstrip()} {turn.answer}"},
        ]
    with reported_as_user_error(ValueError):  # a template may refuse a conversation
        text = tokenizer.apply_chat_template(messages[:-1])
    return text + turns[-1].lead.lstrip()


def _plain(tokenizer: Tokenizer, context: str, turns: Sequence[Turn]) -> str:
    del tokenizer
    said = [f"{turn.question}{turn.lead}" for turn in turns]
    for number, turn in enumerate(turns[:-1]):
        said[number] += f" {turn.answer}\n\n"
    return context + "".join(said)


def _differences(whole: Sequence[str]) -> Iterator[str]:
    before = ""
    for text in whole:
        yield _rest(text, before)
        before = text


def _rest(text: str, before: str) -> str:
    if not text.startswith(before):
        raise UserError(
            "the model's chat template changes earlier turns of a conversation when more follow, "
            "so nothing can be read onto their cache; use --no-chat"
        )
    return text[len(before) :]
