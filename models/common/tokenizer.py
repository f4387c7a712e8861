"""Text to tokens and back, and chat templates."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from models.common.weights.errors import LoadError

_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what a model's files say about using it.

    Attributes:
        backend: the `tokenizers` object.
        chat_template: a Jinja template from messages to a prompt, or None.
        bos_token: the text of the token that begins a sequence, or None.
        eos_token: the text of the token that ends one, or None.
        stop_tokens: ids after which generation ends.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    stop_tokens: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids.

        Args:
            text: any text; special tokens written out in it become single tokens.
            add_special_tokens: also add those that the model expects around a text, such as a
                beginning-of-sequence token. Not wanted after `apply_chat_template`, which writes
                them itself.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included (a model's embedding may be padded beyond it)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self.chat_template is not None

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, special tokens written out.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
            add_generation_prompt: end with what opens the assistant's answer.

        Raises:
            ValueError: there is no template, or it rejects these messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: pass the prompt as plain text")
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the model's chat template rejects these messages: {error}"
            ) from error

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and what goes with it; `load_tokenizer` reads them back."""
        self.backend.save(str(directory / _FILE))
        settings = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
        }
        _write_json(directory / "tokenizer_config.json", settings)
        _write_json(directory / "generation_config.json", {"eos_token_id": list(self.stop_tokens)})


def load_tokenizer(directory: Path) -> Tokenizer:
    """Reads `tokenizer.json` and, where present, its settings, chat template and stop tokens.

    Raises:
        LoadError: `tokenizer.json` is missing or unreadable.
    """
    path = directory / _FILE
    if not path.is_file():
        raise LoadError(
            f"`{directory}` has no `{_FILE}`. Save the model's fast tokenizer there, for example "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained({str(directory)!r})`, or pass "
            "the directory that has it as `tokenizer=`."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise LoadError(
            f"`{path}` is not a tokenizer of the `tokenizers` library: {error}"
        ) from None
    settings = read_json(directory / "tokenizer_config.json")
    bos, eos = (_token_text(settings.get(name)) for name in ("bos_token", "eos_token"))
    stops = _ids(read_json(directory / "generation_config.json").get("eos_token_id"))
    stops += _ids(read_json(directory / "config.json").get("eos_token_id"))
    if eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
        stops.append(eos_id)
    return Tokenizer(
        backend=backend,
        chat_template=_chat_template(directory, settings),
        bos_token=bos,
        eos_token=eos,
        stop_tokens=tuple(dict.fromkeys(stops)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
        LoadError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"`{path}` is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise LoadError(f"`{path}` must hold a JSON object, it holds a {type(values).__name__}")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {item["name"]: item["template"] for item in template}
        return named.get("default")
    return template


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it: trimmed blocks, loop controls, no access to Python."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
    }
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
