"""Tokenizers from directories and from GGUF metadata, and chat templates."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from models import LoadError
from models.common.tokenizer import Tokenizer, load_tokenizer
from models.common.tokenizer_gguf import tokenizer_from_gguf
from tests.models.checkpoints import GOLDEN

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def gpt2_metadata(**changes):
    tokens = [*BYTES, "ab", "12", "123", "<|end|>", "<think>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": ["a b", "1 2", "12 3"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }
    values.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    return values


def pieces(tokenizer, text, **kwargs):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, **kwargs)]


def sentencepiece_metadata():
    case = np.load(GOLDEN / "pretrained" / "sentencepiece.npz")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": json.loads(str(case["tokens"])),
        "tokenizer.ggml.scores": case["scores"].tolist(),
        "tokenizer.ggml.token_type": case["types"].tolist(),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }, dict(zip(json.loads(str(case["texts"])), json.loads(str(case["ids"])), strict=True))


def test_sentencepiece_models_are_rebuilt_exactly():
    metadata, expected = sentencepiece_metadata()
    tokenizer = tokenizer_from_gguf(metadata)
    plain = {text: ids for text, ids in expected.items() if "<|" not in text}
    assert {t: tokenizer.encode(t, add_special_tokens=False) for t in plain} == plain
    assert len(plain) > 15


def test_sentencepiece_texts_come_back():
    metadata, expected = sentencepiece_metadata()
    tokenizer = tokenizer_from_gguf(metadata)
    for text in expected:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_sequences_begin_with_bos_unless_told_otherwise():
    metadata, _ = sentencepiece_metadata()
    assert tokenizer_from_gguf(metadata).encode("x")[0] == 1
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer_from_gguf(metadata).encode("x")[0] != 1


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["123", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("chatglm-bpe", "1234", ["123", "4"]),
        ("default", "1234", ["123", "4"]),
        ("default", "ab!ab", ["ab", "!", "ab"]),
        ("gpt-2", "ab  ab", ["ab", "Ġ", "Ġ", "ab"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, text, expected):
    assert pieces(tokenizer_from_gguf(gpt2_metadata(pre=pre)), text) == expected


def test_special_tokens_stay_whole():
    tokenizer = tokenizer_from_gguf(gpt2_metadata())
    assert pieces(tokenizer, "ab<|end|>ab<think>") == ["ab", "<|end|>", "ab", "<think>"]
    ids = tokenizer.encode("ab<|end|><think>")
    assert tokenizer.decode(ids) == "ab<think>"  # control tokens are no text
    assert tokenizer.stop_tokens == (tokenizer.backend.token_to_id("<|end|>"),)


def test_known_ends_stop_beside_the_stated_one():
    tokenizer = tokenizer_from_gguf(gpt2_metadata(eos_token_id=len(BYTES)))
    assert tokenizer.stop_tokens == (len(BYTES), tokenizer.backend.token_to_id("<|end|>"))
    ordinary = gpt2_metadata(eos_token_id=0)
    ordinary["tokenizer.ggml.token_type"][-2] = 1
    assert tokenizer_from_gguf(ordinary).stop_tokens == (0,)


def test_markers_are_added_when_the_file_says_so():
    end = len(BYTES) + 3
    metadata = gpt2_metadata(bos_token_id=end, add_bos_token=True, add_eos_token=True)
    tokenizer = tokenizer_from_gguf(metadata)
    assert pieces(tokenizer, "ab") == ["<|end|>", "ab", "<|end|>"]
    assert pieces(tokenizer, "ab", add_special_tokens=False) == ["ab"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "mystery"}, "`tokenizer.ggml.pre` is 'mystery'; built in are .*qwen2"),
        ({"pre": None}, "`tokenizer.ggml.pre` is None"),
        ({"model": "t5"}, "of the kind 't5'"),
        ({"model": None}, "has no tokenizer"),
        ({"merges": None}, "no `tokenizer.ggml.merges`"),
        ({"merges": ["a mystery"]}, "do not fit together"),
        ({"model": "llama"}, "but 0 `tokenizer.ggml.scores`"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.items())),
)
def test_unknown_kinds_are_explained(changes, message):
    with pytest.raises(LoadError, match=message):
        tokenizer_from_gguf(gpt2_metadata(**changes))


def small_tokenizer(**kwargs):
    backend = Backend(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(BYTES))]
    )
    return Tokenizer(backend=backend, **kwargs)


def test_a_directory_is_read(tmp_path):
    small_tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}yes"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [256, *tokenizer.encode("a", add_special_tokens=False)]
    assert tokenizer.decode(tokenizer.encode("é!")) == "é!"
    assert tokenizer.stop_tokens == (258, 257)
    assert tokenizer.vocab_size == 259
    assert tokenizer.apply_chat_template([]) == "<s>yes"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert load_tokenizer(tmp_path).apply_chat_template([]) == "from its own file"


def test_saving_and_loading_gives_the_same(tmp_path):
    tokenizer = small_tokenizer(
        chat_template="{{ messages }}", bos_token="<s>", eos_token="</s>", stop_tokens=(258, 257)
    )
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("any text <|eot|>") == tokenizer.encode("any text <|eot|>")
    for field in ("chat_template", "bos_token", "eos_token", "stop_tokens"):
        assert getattr(loaded, field) == getattr(tokenizer, field)


def test_a_damaged_file_is_explained(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match="is not a tokenizer of the `tokenizers` library"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "user: <é>\n",
        ),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
    ],
)
def test_chat_templates_render_as_in_transformers(template, expected):
    tokenizer = small_tokenizer(chat_template=template, bos_token="<s>", eos_token="</s>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "<é>"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "rejects.*roles must alternate"),
        ("{% if %}", "rejects"),
        ("{{ messages.__class__.__mro__ }}", "rejects.*unsafe"),
    ],
)
def test_unusable_templates_are_explained(template, message):
    tokenizer = small_tokenizer(chat_template=template)
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
