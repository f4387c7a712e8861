"""Models of the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from models.common.weights.errors import LoadError

_FILES = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
_NOT_THESE = ["original/*", "consolidated*", "*/*"]


def is_hub_id(source: str) -> bool:
    """Whether a source could be `organisation/name` rather than a path."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None
        and not source.endswith(".gguf")
    )  # fmt: skip


def download(repository: str) -> Path:
    """Fetches (or finds in the cache) the files that loading needs.

    Raises:
        LoadError: the repository does not exist, may not be read, or cannot be reached.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=_FILES, ignore_patterns=_NOT_THESE
            )
        )
    except hub_errors.GatedRepoError as error:
        raise LoadError(
            f"`{repository}` asks for its licence to be accepted: do so on its page, then log in "
            "with `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise LoadError(
            f"the hub has no model `{repository}` (or it is private), and there is no such path "
            "here; check the spelling, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # also of the client's HTTP library, whichever it uses
        raise LoadError(
            f"`{repository}` is not a path here, and it could not be fetched from the hub "
            f"({type(error).__name__}). Go online (and unset HF_HUB_OFFLINE), or download the "
            "model elsewhere and pass its directory."
        ) from error
