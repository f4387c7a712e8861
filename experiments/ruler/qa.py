"""Questions about documents: SQuAD (one document answers) and HotpotQA (several do).

The documents of the question stand among others, in random order; for SQuAD, others of the same
article come first. Prompts are worded as published (RULER, appendix D). Our own: one of the other
documents may be cut, so that the prompt fits; those of the question never are.

Files are those of the data sets: `squad.json` is SQuAD's dev-v2.0.json, `hotpotqa.json` is
HotpotQA's hotpot_dev_distractor_v1.json.
"""

import json
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.common.prompts import first_words
from experiments.ruler.draft import Draft, Question, Questions, Request

_RULE = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


def ask_about_documents(request: Request, size: int, rest: int) -> Draft:
    """Shuffles the question's documents with `size` others and `rest` words of one more."""
    if request.questions is None:
        raise UserError("there are no questions; name the folder that holds them")
    if request.index >= len(request.questions.items):
        raise UserError(
            f"there are {len(request.questions.items)} questions; ask for at most as many samples"
        )
    rng = request.rng()
    question = request.questions.items[request.index]
    documents = request.questions.documents
    near = rng.sample(question.near, len(question.near))
    known = {*question.gold, *near}
    far = [number for number in range(len(documents)) if number not in known]
    rng.shuffle(far)
    others = [*near, *far]
    chosen = [documents[number] for number in (*question.gold, *others[:size])]
    if rest and size < len(others):
        chosen.append(first_words(documents[others[size]], rest))
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))
    return Draft(
        prompt=f"{_RULE}\n\nThe following are given documents.\n\n{context}\n\n{_RULE}\n\n"
        f"Question: {question.query}",
        lead="Answer:",
        answers=question.answers,
    )


def read_squad(path: Path) -> Questions:
    """Reads SQuAD 2.0: questions that its paragraphs answer.

    Raises:
        UserError: the file cannot be read, or is no such data set.
    """
    try:
        articles = [
            [(paragraph["context"], paragraph["qas"]) for paragraph in article["paragraphs"]]
            for article in _read(path)["data"]
        ]
        numbers = _number({context for article in articles for context, _ in article})
        items = tuple(
            Question(
                query=qa["question"],
                answers=tuple(dict.fromkeys(answer["text"] for answer in qa["answers"])),
                gold=(numbers[context],),
                near=tuple(sorted({numbers[other] for other, _ in article} - {numbers[context]})),
            )
            for article in articles
            for context, qas in article
            for qa in qas
            if not qa["is_impossible"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not SQuAD 2.0 ({error!r} is missing or wrong)") from error
    return Questions(items=items, documents=tuple(numbers))


def read_hotpotqa(path: Path) -> Questions:
    """Reads HotpotQA (distractor setting): each question with its ten paragraphs.

    Raises:
        UserError: the file cannot be read, or is no such data set.
    """
    try:
        rows = [
            (
                row["question"],
                row["answer"],
                [f"{t}\n{''.join(lines)}" for t, lines in row["context"]],
            )
            for row in _read(path)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not HotpotQA ({error!r} is missing or wrong)") from error
    numbers = _number({text for *_, context in rows for text in context})
    items = tuple(
        Question(query=query, answers=(answer,), gold=tuple(numbers[text] for text in context))
        for query, answer, context in rows
    )
    return Questions(items=items, documents=tuple(numbers))


def _number(documents: set[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(documents))}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
