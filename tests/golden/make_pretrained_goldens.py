"""Writes the golden files of the tests on pretrained weights and on tokenizers.

`pretrained/<model>.npz`, from transformers' own loading of the same GGUF file in fp32, holds

    tokens            [512] int32, the beginning of a chapter of Moby-Dick
    top_ids           [512, 64] int32, the 64 most likely next tokens at each position, best first
    top_log_probs     [512, 64] fp32, their log-probabilities
    texts, ids        JSON: sample texts and their encodings, no token added around them
    messages, prompt  JSON: a conversation, and its prompt after the chat template

`pretrained/sentencepiece.npz` holds a small SentencePiece model (tokens, scores, types), trained on
the same text with the options of Llama's, and sample texts with SentencePiece's own encodings.

    pip install torch transformers gguf sentencepiece
    python tests/golden/make_pretrained_goldens.py MODELS_FOLDER moby_dick.txt [FULL_LOGITS_FOLDER]

With a third argument the complete log-probabilities go there, too, to measure divergences by hand.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "pretrained"
POSITIONS, TOP = 512, 64
MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
}
SAMPLES = [
    "Hello, world!",
    "  two spaces, then\ttabs\t\tand\n\n\nnew lines   \n  ",
    "I'll say we've DON'T'VE they're it's 'quoted' O'Neill's",
    "In 1984, 12345678 people paid $3.14159 (or 2,718.28) on 2024-02-29 at 07:05.",
    "naïve café Ærøskøbing Straße İstanbul ŁÓDŹ",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم",  # noqa: RUF001
    "日本語の文章と中文句子,한국어 문장。१२३ ٤٥٦",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and combining e\u0301 a\u0308, zero\u200bwidth, nbsp\u00a0here",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\n\tif (a != b && c <= d) { x++; }\n",
    "https://example.com/a_b-c?d=e&f=%20#g user@host.org C:\\path\\to\\file.txt",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>done",
    "<html><b>bold</b></html> ``` ~~~ ### --- *** ___ ... !!! ???",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " ",
    "",
    "\u0000\u0001\u001f\u007f\ufffd",
]
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 2 < 3 & \"why\"?"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Thanks — bye!"},
]  # fmt: skip


def passage(text: str) -> str:
    """The first chapter, behind the table of contents."""
    return text[text.rindex("Call me Ishmael") :]


def pretrained(path: Path, text: str, full: Path | None) -> dict[str, np.ndarray]:
    source = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    if "SmolLM2" in path.name:
        # The model's own tokenizer cuts every digit off first, of any script. transformers does not
        # know this kind of GGUF tokenizer and leaves the step out; other scripts show it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source).eval()
    tokens = tokenizer(text[: 8 * POSITIONS], add_special_tokens=False).input_ids[:POSITIONS]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    if full is not None:
        np.save(full / f"{path.stem}.npy", log_probs.float().numpy())
    top = log_probs.topk(TOP)
    return {
        "tokens": np.array(tokens, np.int32),
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_log_probs": top.values.numpy().astype(np.float32),
        "texts": np.array(json.dumps(SAMPLES)),
        "ids": np.array(
            json.dumps([tokenizer.encode(s, add_special_tokens=False) for s in SAMPLES])
        ),
        "messages": np.array(json.dumps(MESSAGES)),
        "prompt": np.array(
            tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        ),
    }


def small_sentencepiece(text: str) -> dict[str, np.ndarray]:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=900,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    indices = range(model.get_piece_size())
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in indices]
    texts = [sample for sample in SAMPLES if "\0" not in sample] + text[:4000].split("\n\n")
    return {
        "tokens": np.array(json.dumps([model.id_to_piece(i) for i in indices])),
        "scores": np.array([model.get_score(i) for i in indices], np.float32),
        "types": np.array(types, np.int32),
        "texts": np.array(json.dumps(texts)),
        "ids": np.array(json.dumps([model.encode(sample) for sample in texts])),
    }


def main() -> None:
    models, book = Path(sys.argv[1]), Path(sys.argv[2])
    full = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    text = passage(book.read_text(encoding="utf-8"))
    OUT.mkdir(exist_ok=True)
    np.savez_compressed(OUT / "sentencepiece.npz", **small_sentencepiece(text))
    for name, file in MODELS.items():
        np.savez_compressed(OUT / f"{name}.npz", **pretrained(models / file, text, full))
    for path in sorted(OUT.glob("*.npz")):
        print(f"{path.name:28s} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
