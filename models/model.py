"""A loaded model: configuration, parameters and tokenizer together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.kv_cache import KVCompression
from minference_jax.types import AttentionFn
from models.common import decoder
from models.common.cache import KVCache
from models.common.config import DecoderConfig
from models.common.generate import generate
from models.common.sampling import Sampling
from models.common.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What `load_model` returns. Its methods are thin: the functions of `params` do the work.

    Attributes:
        config: hyper-parameters; `dataclasses.replace(model, config=...)` makes a changed model.
        params: the tree of arrays described in `models.common.decoder`.
        tokenizer: text to tokens and back.
        name: as a GGUF file declares it, or else that of the file, directory or hub repository.
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    name: str | None = None

    def prefill(
        self,
        tokens: Int[Array, "batch s"] | Int[np.ndarray, "batch s"] | Sequence[int],
        *,
        attention_fn: AttentionFn,
        lengths: Int[Array, " batch"] | None = None,
        capacity: int | None = None,
        rope_length: Int[Array, " batch"] | None = None,
        chunk_size: int | None = None,
        observe: decoder.Observe | None = None,
        compression: KVCompression | None = None,
    ) -> (
        tuple[Float[Array, "batch vocab"], KVCache]
        | tuple[Float[Array, "batch vocab"], KVCache, Any]
    ):
        """Reads prompts; see `models.common.decoder.prefill`. A plain list of ids is one prompt."""
        ids = jnp.asarray(tokens, dtype=jnp.int32)
        return decoder.prefill(
            self.params,
            ids if ids.ndim == 2 else ids.reshape(1, -1),
            config=self.config,
            attention_fn=attention_fn,
            lengths=lengths,
            capacity=capacity,
            rope_length=rope_length,
            chunk_size=chunk_size,
            observe=observe,
            compression=compression,
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        attention_fn: AttentionFn,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008, immutable
        key: Array | None = None,
        chunk_size: int | None = None,
        compression: KVCompression | None = None,
    ) -> str | list[str]:
        """Continues one prompt, or several at once.

        Args:
            prompt: plain text; write a conversation with `tokenizer.apply_chat_template` first.
            attention_fn: used while reading the prompt; new tokens attend densely to the cache.
            max_new_tokens: tokens to generate at most.
            sampling: greedy unless its temperature is above 0.
            key: random key, needed for sampling.
            chunk_size: prompt tokens read at once, all if None.
            compression: what each layer keeps of the prompt for decoding, everything if None.

        Returns:
            The new text (without the prompt), or a list of them for a list of prompts.

        Raises:
            ValueError: a prompt is empty, or longer than the context with the new tokens.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [self._encode(text) for text in prompts]
        tokens = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        result = generate(
            self.params,
            jnp.asarray(tokens),
            config=self.config,
            attention_fn=attention_fn,
            lengths=jnp.asarray([len(ids) for ids in rows], dtype=jnp.int32),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=key,
            stop_tokens=self.tokenizer.stop_tokens,
            chunk_size=chunk_size,
            compression=compression,
        )
        new, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        texts = [
            self.tokenizer.decode(row[:length].tolist())
            for row, length in zip(new, lengths, strict=True)
        ]
        return texts[0] if isinstance(prompt, str) else texts

    def _encode(self, text: str) -> list[int]:
        # A chat template writes the first token itself.
        bos = self.tokenizer.bos_token
        ids = self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        return ids
