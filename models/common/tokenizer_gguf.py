"""Tokenizers rebuilt from the vocabulary, merges or scores in GGUF metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from models.common.tokenizer import Tokenizer
from models.common.weights.errors import LoadError

# How text is cut before merging, by `tokenizer.ggml.pre`. The expressions are those of the models'
# own tokenizers; llama.cpp names them after the first model that used each.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_CASED_WORD) + r"|\p{N}" + _CASED_TAIL
_GPT4O = "|".join(w + _CONTRACTIONS + "?" for w in _CASED_WORD) + r"|\p{N}{1,3}" + _CASED_TAIL
_PUNCTUATION_FIRST = (
    r"[\p{P}\$\+<=>\^~\|]+",
    _GPT2.removesuffix(r"|\s+"),
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _PUNCTUATION_FIRST,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "dbrx"), (_LLAMA3,)
    ),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
# These look a whole piece up in the vocabulary before merging its bytes.
_WHOLE_PIECES_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
# GGUF states one end of a sequence where models have several; these texts mean nothing else.
_ENDS = frozenset({"<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>"})
_SPACE = "\u2581"


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that GGUF metadata describes.

    Raises:
        LoadError: there is none, or it is of a kind that is not built in.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise LoadError(
            "the GGUF file has no tokenizer; pass a directory with the model's `tokenizer.json` as "
            "`tokenizer=`"
        )
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise LoadError(
            f"the GGUF file's tokenizer is of the kind {kind!r}; built in are 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece). Pass a directory with the model's `tokenizer.json` "
            "as `tokenizer=`."
        )
    try:
        backend = builders[kind](metadata, tokens)
    except LoadError:
        raise
    except Exception as error:  # the library raises bare Exception for what does not fit together
        raise LoadError(
            f"the GGUF file's vocabulary and merges do not fit together ({error}); the file is "
            "damaged, download it again"
        ) from error
    _add_special_tokens(backend, metadata, tokens)
    _add_sequence_markers(backend, metadata, tokens, default_bos=kind == "llama")
    return Tokenizer(
        backend=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_token=_token(metadata, tokens, "bos"),
        eos_token=_token(metadata, tokens, "eos"),
        stop_tokens=_stop_tokens(metadata, tokens),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise LoadError(
            f"the GGUF file's `tokenizer.ggml.pre` is {pre!r}; built in are "
            f"{', '.join(sorted(_SPLITS))}. Pass a directory with the model's `tokenizer.json` as "
            "`tokenizer=`."
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise LoadError("the GGUF file has a BPE vocabulary but no `tokenizer.ggml.merges`")
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            # A merge is two tokens with one space between; a token itself never holds a space.
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _WHOLE_PIECES_FIRST,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    """SentencePiece BPE: scores rank the merges, unknown characters fall back to bytes."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise LoadError(
            f"the GGUF file has {len(tokens)} tokens but {len(scores or ())} "
            "`tokenizer.ggml.scores`; convert the model again"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(metadata, vocab, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if prefix else spaces
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return backend


def _merges_from_scores(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best-scored result first."""
    normal = gguf.TokenType.NORMAL
    types = metadata.get("tokenizer.ggml.token_type") or [normal] * len(vocab)
    merges = [
        (-scores[index], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, index in vocab.items()
        if types[index] in (normal, gguf.TokenType.USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(
    backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> None:
    types = metadata.get("tokenizer.ggml.token_type") or ()
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        chosen = [token for token, type in zip(tokens, types, strict=False) if type == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)


def _add_sequence_markers(
    backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str], *, default_bos: bool
) -> None:
    """Begins (and ends) texts as the metadata asks; SentencePiece files begin by default."""
    bos = _token(metadata, tokens, "bos")
    eos = _token(metadata, tokens, "eos")
    before = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", default_bos) else []
    after = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
        )


def _stop_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[int, ...]:
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type") or ()
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == gguf.TokenType.CONTROL and token in _ENDS
    ]
    return tuple(dict.fromkeys(stop for stop in [*stated, *known] if stop is not None))


def _token(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None
