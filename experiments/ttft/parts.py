"""Where the time of a prefill goes: parts compiled and timed apart, at the same shapes.

Of the first layers of the model, with their real queries, keys and values:

    linear     a layer around `mix` in place of attention: norms, projections, rotary embedding, MLP
    kv         what a compression makes of a layer's keys and values, and the copy into the cache
    index      the attention's list of visited blocks: estimate and selection, without attending
    attention  the whole attention less `index`: plan, gather and kernel

and once `ends`: embedding, final norm and LM head of the last token. `linear`, `kv` and `index`
take as long in every layer and are multiplied by the number of layers; `attention` goes by what the
kernels of all layers executed in the whole prefill. What is left of the whole's time is `other`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.ttft import flops
from experiments.ttft.attention import Executed, mix
from experiments.ttft.rows import Figures
from experiments.ttft.subject import Subject, first_layers
from experiments.ttft.whole import Cache, executed_pairs
from models.common.layers import TOKENS_PER_CHUNK
from models.common.passes import run_embedding, run_logits
from models.common.stack import run_layer
from pallas_kernels.common.timing import time_calls

PARTS = ("ends", "linear", "kv", "index", "attention", "other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What does not depend on the attention, at one length; seconds, of one layer.

    Attributes:
        ends: embedding and LM head, of the model.
        linear: of a layer.
        plain: of the plain products of a layer's projections and MLP, for as many tokens.
    """

    ends: float
    linear: float
    plain: float


def measure_shared(subject: Subject, tokens: Array) -> Shared:
    """Times what all methods share."""
    config, length = subject.config, tokens.shape[1]

    def ends(params, tokens):
        x = run_embedding(params, tokens, config=config)
        return x, run_logits(params, x[:, -1], config=config)

    def linear(params, x):
        attend = lambda q, k, v: (mix(q, k, v), None)
        return run_layer(params, 0, x, _rope_length(length), config=config, attend=attend)[0]

    in_params = {name: leaf for name, leaf in subject.params.items() if name != "layers"}
    ends_seconds = _seconds(ends, in_params, tokens)
    x = jax.jit(run_embedding, static_argnames="config")(in_params, tokens, config=config)
    rows = x[0, :TOKENS_PER_CHUNK]
    layer = first_layers(subject.params["layers"], 1)
    plain = _seconds(flops.plain_matmuls, jax.tree.map(lambda leaf: leaf[0], layer), rows)
    params = {**in_params, "layers": layer}
    return Shared(
        ends=ends_seconds,
        linear=_seconds(linear, params, x),
        plain=plain * length / rows.shape[0],
    )


def split(
    whole: float,
    subject: Subject,
    tokens: Array,
    attention: Any,
    cache: Cache,
    executed: Executed | None,
    shared: Shared,
    *,
    layers: int,
) -> Figures:
    """Times the parts of a method, and returns the seconds of each in `whole`.

    Args:
        whole: seconds of the whole prefill.
        subject: the model.
        tokens: a prompt that is read whole.
        attention: of all layers.
        cache: what is kept.
        executed: by the whole prefill, None of attention without an index.
        shared: of this length.
        layers: the first ones, that are timed.
    """
    config, length = subject.config, tokens.shape[1]
    number = config.num_layers

    def step(params, x, attention, at):
        def attend(q, k, v):
            return attention(q, k, v), (q, k, v)

        return run_layer(params, at, x, _rope_length(length), config=config, attend=attend)

    def keep(q, k, v, compression):
        kept = (k, v) if compression is None else compression(q, k, v)[:2]
        room = lambda x: ((0, 0), (0, cache.capacity - x.shape[1]), (0, 0), (0, 0))
        return [jnp.pad(x, room(x)) for x in kept]

    lists = lambda attention, q, k, v: attention.attend(q, k, v)[1]
    x = jax.jit(run_embedding, static_argnames="config")(subject.params, tokens, config=config)
    advance, times, pairs = jax.jit(step), [], 0.0
    of_layer = lambda tree, at: jax.tree.map(lambda leaf: leaf[at], tree)
    for at in range(min(layers, number)):
        own = of_layer(attention, at)
        x, (q, k, v) = advance(subject.params, x, own, at)
        kv = _seconds(keep, q, k, v, of_layer(cache.compression, at))
        estimate = 0.0
        if executed is not None:
            estimate, found = _timed(lists, own, q, k, v)
            pairs += float(executed_pairs(_with_layers(Executed.of(found)), length)[0])
        attend = _seconds(lambda own, q, k, v: own(q, k, v), own, q, k, v)
        times.append((kv, estimate, attend))
        del q, k, v
    kv, estimate, attend = np.mean(times, axis=0)
    kernel = max(attend - estimate, 0.0) * len(times)
    scale = number / len(times) if executed is None else _total(executed, length) / pairs
    parts = {
        "ends": shared.ends,
        "linear": shared.linear * number,
        "kv": float(kv) * number,
        "index": float(estimate) * number,
        "attention": float(kernel * scale),
    }
    return {"parts": parts | {"other": whole - sum(parts.values())}, "part_layers": len(times)}


def by_difference(whole: float, subject: Subject, shared: Shared) -> Figures:
    """The parts where attention is what the others leave, for extrapolated rows."""
    parts = {"ends": shared.ends, "linear": shared.linear * subject.config.num_layers}
    return {"parts": parts | {"attention": whole - sum(parts.values())}, "part_layers": 0}


def linear_figures(subject: Subject, shared: Shared, length: int) -> Figures:
    """The rate of the linear part beside that of plain products of the same shapes."""
    done = flops.linear_flops(subject.config) * length
    return {
        "linear_flops_per_s": done / shared.linear,
        "plain_flops_per_s": done / shared.plain,
        "linear_of_plain": shared.plain / shared.linear,
    }


def extrapolate(seconds: float, shared: Shared, *, timed: int, layers: int) -> float:
    """Seconds of all layers from those of a model of the first ones."""
    return shared.ends + (seconds - shared.ends) * layers / timed


def _total(executed: Executed, length: int) -> float:
    return float(executed_pairs(executed, length).sum())


def _rope_length(length: int) -> Array:
    return jnp.full((1,), length, jnp.int32)


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, compilation apart, and what it returns."""
    compiled = jax.jit(call).lower(*arguments).compile()
    seconds = float(np.median(time_calls(compiled, *arguments)))
    return seconds, compiled(*arguments)


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(call).lower(*arguments).compile()
    return float(np.median(time_calls(compiled, *arguments)))


def _with_layers(executed: Executed) -> Executed:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], executed)
