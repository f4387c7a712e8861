"""Running a model on one prompt, with times, densities and the index kept."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from tqdm import tqdm

import minference_jax as mj
from experiments.common.devices import on_host
from experiments.common.errors import UserError, reported_as_user_error
from experiments.common.measure import peak_memory, stage
from experiments.common.memory import check_room
from experiments.common.options import LoadOptions, SamplingOptions
from minference_jax.kv_cache import KVCompression
from models import LoadError, Model, abstract_model, load_model
from models.common.cache import kept_tokens
from models.common.checks import check_context
from models.common.decoder import decode_step, prefill
from models.common.memory import compiled_bytes, device_memory
from models.common.sampling import Sampling, choice_of, choose_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillRun:
    """A prompt that was read.

    Attributes:
        logits: of the next token.
        cache: keys and values, for decoding.
        cache_bytes: memory that they take.
        density: share of the causal pairs that each head visited.
        index: of every layer and chunk, leaves [layers, chunks, ...]; None if not kept.
        chunk_size: tokens of a chunk.
        compile_seconds: time to trace and compile.
        seconds: time of each run, until the logits were there.
        peak_memory: most bytes held up to the end of this run.
        program_bytes: what the compiled program needs by its own account.
    """

    logits: Float[np.ndarray, " vocab"]
    cache: Any
    cache_bytes: int
    density: Float[np.ndarray, "layers heads"]
    index: Any
    chunk_size: int
    compile_seconds: float
    seconds: list[float]
    peak_memory: int
    program_bytes: int

    @property
    def median_seconds(self) -> float:
        """Median time of a run: the time to first token, compilation apart."""
        return float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Text that was generated after a prompt.

    Attributes:
        text: the text, without the tokens that end it.
        tokens: generated tokens, the ending one included.
        compile_seconds: time to trace and compile one decoding step.
        seconds: time of all decoding steps.
    """

    text: str
    tokens: list[int]
    compile_seconds: float
    seconds: float


def load(options: LoadOptions, console: Console, mesh: Mesh | None = None) -> Model:
    """Loads a model, onto a mesh if given; raises UserError if its source cannot be used."""
    with (
        stage(console, f"loading {Path(options.model).name}"),
        tqdm(unit="tensor", leave=False, disable=None) as bar,
        reported_as_user_error(LoadError, OSError),
    ):

        def on_tensor(read: int, total: int) -> None:
            bar.total = total
            bar.update(read - bar.n)

        return load_model(
            options.model,
            dtype=options.jax_dtype,
            mesh=mesh,
            tokenizer=options.tokenizer,
            rope_scaling=options.scaling,
            on_tensor=on_tensor,
        )


def sketch(options: LoadOptions) -> Model:
    """A model whose parameters are shapes only; raises UserError if its source cannot be used."""
    with reported_as_user_error(LoadError, OSError):
        return abstract_model(
            options.model,
            dtype=options.jax_dtype,
            tokenizer=options.tokenizer,
            rope_scaling=options.scaling,
        )


def check_fits(length: int, model: Model) -> None:
    """Raises UserError when prompts of `length` tokens are longer than the model's context."""
    try:
        check_context(length, model.config)
    except ValueError as error:
        context = model.config.max_position
        raise UserError(
            f"{length} tokens do not fit the model's context of {context}; ask for at most that, "
            f"or extend it with --rope-scaling, for example yarn:{math.ceil(length / context)}"
        ) from error


def encode(
    model: Model, text: str, *, chat: bool, max_new_tokens: int, lead: str = ""
) -> Int[np.ndarray, "1 s"]:
    """Returns the prompt's tokens; raises UserError if the model's context cannot hold them.

    Args:
        model: the model.
        text: the prompt.
        chat: put it into the chat template, if there is one.
        max_new_tokens: to be generated after it.
        lead: how the answer begins. A template ends with a space of its own.
    """
    tokens = tokens_of(model, text, chat=chat, lead=lead)
    needed, context = len(tokens) + max_new_tokens, model.config.max_position
    if needed > context:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and up to {max_new_tokens} are to be generated, "
            f"but the model's context is {context} tokens; shorten the prompt, or extend the "
            f"context with --rope-scaling, for example dynamic:{math.ceil(needed / context)}"
        )
    return np.asarray([tokens], np.int32)


def tokens_of(model: Model, text: str, *, chat: bool, lead: str = "") -> list[int]:
    """Returns the prompt's tokens, as `encode` does, however many there are."""
    tokenizer = model.tokenizer
    if chat and tokenizer.has_chat_template:
        with reported_as_user_error(ValueError):  # a template may refuse a conversation
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return tokenizer.encode(text + lead.lstrip(), add_special_tokens=False)
    return tokenizer.encode(text + lead)


def observe_density(attention: Any, *qkv: Array, **where: Any) -> tuple[Array, Any]:
    """Attention of one layer, with the pairs that it visited and None for its index."""
    out, pairs = mj.observe_density(attention, *qkv, **where)
    return out, (pairs, None)


def observe_index(attention: Any, *qkv: Array, **where: Any) -> tuple[Array, Any]:
    """Attention of one layer, with the pairs that it visited and its index."""
    q, k, _ = qkv
    out, index = attention.attend(*qkv, **where)
    pairs = index.visited_pairs(q.shape[1], k.shape[1], **where)
    return out, (mj.VisitedPairs(*pairs), index)


def run_prefill(
    model: Model,
    tokens: Int[np.ndarray, "1 s"],
    attention: Any,
    *,
    name: str,
    console: Console,
    max_new_tokens: int = 1,
    chunk_size: int | None = None,
    repeats: int = 1,
    keep_index: bool = False,
    compression: KVCompression | None = None,
) -> PrefillRun:
    """Reads a prompt: compiles once, then runs `repeats` times.

    Args:
        model: the model.
        tokens: one prompt.
        attention: the attention, with a leading [layers] axis on its arrays.
        name: what to call the run while it is shown.
        console: where progress is shown.
        max_new_tokens: room left in the cache.
        chunk_size: tokens read at a time, all if None.
        repeats: timed runs.
        keep_index: also keep what was visited; block-sparse lists of long prompts are large.
        compression: what is kept of the prompt, everything if None.
    """
    length = tokens.shape[1]
    total = length + max_new_tokens
    kept = kept_tokens(compression, length)

    def read(params: Any, tokens: Array, attention: Any, compression: Any) -> Any:
        return prefill(
            params,
            tokens,
            config=model.config,
            attention_fn=attention,
            capacity=kept + max_new_tokens if kept else 0,
            rope_length=jnp.full((1,), total, jnp.int32),
            chunk_size=chunk_size or length,  # so that observations always have a chunk axis
            observe=observe_index if keep_index else observe_density,
            compression=compression,
        )

    arguments = (model.params, jnp.asarray(tokens), attention, compression)
    with stage(console, f"{name}: compiling the prefill") as compiling:
        compiled = jax.jit(read).lower(*arguments).compile()
    needed = compiled_bytes(compiled)
    check_room(needed, device_memory())
    seconds: list[float] = []
    found: Any = None
    with stage(console, f"{name}: reading {length} tokens"):
        for _ in range(repeats):
            found = None  # the caches of two runs need not exist at once
            start = time.perf_counter()
            found = jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
    logits, cache, (pairs, index) = found
    visited, causal = (on_host(count).astype(np.float64).sum(axis=1)[:, 0] for count in pairs)
    return PrefillRun(
        logits=np.asarray(logits[0], np.float32),
        cache=cache,
        cache_bytes=cache.keys.nbytes + cache.values.nbytes,
        density=(visited / causal).astype(np.float32),
        index=index,
        chunk_size=min(chunk_size or length, length),
        compile_seconds=compiling.seconds,
        seconds=seconds,
        peak_memory=peak_memory(),
        program_bytes=needed,
    )


def run_decode(
    model: Model, run: PrefillRun, options: SamplingOptions, *, name: str, console: Console
) -> Generation:
    """Generates after a prompt until a stop token or the limit; uses up the run's cache."""
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    choice = choice_of(sampling, model.config.vocab_size)
    keys = jax.random.split(jax.random.key(options.seed), options.max_new_tokens)

    def step(params: Any, token: Array, cache: Any, key: Array) -> Any:
        logits, cache = decode_step(params, token, cache, config=model.config)
        return choose_tokens(logits, choice, key), cache

    token = choose_tokens(jnp.asarray(run.logits)[None, :], choice, keys[0])
    with stage(console, f"{name}: compiling the decoding step") as compiling:
        # The cache is donated: it is updated in place instead of being copied for every token.
        jitted = jax.jit(step, donate_argnums=2)
        compiled = jitted.lower(model.params, token, run.cache, keys[0]).compile()
    generated, cache = [int(token[0])], run.cache
    start = time.perf_counter()
    for key in tqdm(keys[1:], desc=f"{name}: decoding", unit="token", leave=False, disable=None):
        if generated[-1] in model.tokenizer.stop_tokens:
            break
        token, cache = compiled(model.params, token, cache, key)
        generated.append(int(token[0]))
    seconds = time.perf_counter() - start
    stops = model.tokenizer.stop_tokens
    text = model.tokenizer.decode([token for token in generated if token not in stops])
    return Generation(
        text=text.strip(),
        tokens=generated,
        compile_seconds=compiling.seconds,
        seconds=seconds,
    )


def visited_mask(
    run: PrefillRun, *, layer: int, head: int, length: int
) -> Bool[np.ndarray, "length length"]:
    """Returns the keys that each query of one head visited, for a prompt of `length` tokens."""
    index = jax.tree.map(lambda leaf: leaf[layer, :, :, head : head + 1], run.index)

    @jax.jit
    def rows(index: Any, q_offset: Array) -> Array:
        lengths = jnp.full((1,), length, jnp.int32)
        return index.to_mask(run.chunk_size, length, lengths=lengths, q_offset=q_offset)[0, 0]

    chunks = [
        np.asarray(rows(jax.tree.map(lambda leaf, n=number: leaf[n], index), jnp.int32(first)))
        for number, first in enumerate(range(0, length, run.chunk_size))
    ]
    return np.concatenate(chunks)[:length]
