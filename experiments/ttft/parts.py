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
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.ttft import flops
from experiments.ttft.attention import mix
from experiments.ttft.rows import Figures
from experiments.ttft.subject import Subject
from experiments.ttft.whole import Case, executed_pairs
from minference_jax.pairs import Executed
from models.common.config import DecoderConfig
from models.common.layers import TOKENS_PER_CHUNK
from models.common.passes import run_embedding, run_logits
from models.common.placement import ONE_DEVICE, Placement
from models.common.stack import run_layer
from pallas_kernels.common.timing import Programs, time_calls

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


def add_shared(programs: Programs, subject: Subject, length: int, *, layers: int) -> None:
    """Adds what `measure_shared` runs, and what `split` needs of so many layers."""
    own = _Layer(subject.config, length)
    tokens, x, qkv = own.shapes(subject)
    programs.add("ends", own.ends, _ends(subject), tokens)
    programs.add("embed", own.embed, _ends(subject), tokens)
    first = _layer(subject, 0)
    programs.add("plain", flops.plain_matmuls, first, own.rows(x))
    programs.add("linear", own.linear, first, x)
    if layers:
        programs.add("project", own.project, first, x)
    if layers > 1:
        programs.add("finish", own.finish, first, x, qkv[0])


def measure_shared(programs: Programs, subject: Subject, tokens: Array) -> Shared:
    """Times what all methods share."""
    length, ends = tokens.shape[1], _ends(subject)
    own = _Layer(subject.config, length)
    seconds = lambda name, *arguments: _median(programs.get(name, *arguments), *arguments)
    x = programs.get("embed", ends, tokens)(ends, tokens)
    first, rows = _layer(subject, 0), own.rows(x)
    return Shared(
        ends=seconds("ends", ends, tokens),
        linear=seconds("linear", first, x),
        plain=seconds("plain", first, rows) * length / rows.shape[0],
    )


def add_ends(programs: Programs, case: Case) -> None:
    """Adds what `measure_ends` runs."""
    own = _Layer(case.subject.config, case.length, case.place)
    programs.add(f"ends {case.length}", own.ends, _ends(case.subject), case.arguments[1])


def measure_ends(programs: Programs, case: Case, tokens: Array) -> float:
    """Seconds of embedding and LM head on the devices of a prefill."""
    arguments = _ends(case.subject), jax.device_put(tokens, case.everywhere)
    return _median(programs.get(f"ends {case.length}", *arguments), *arguments)


def add_split(programs: Programs, case: Case) -> None:
    """Adds what `split` runs."""
    own = _Layer(case.subject.config, case.length)
    qkv = own.shapes(case.subject)[2]
    attention, compression = _of_layer((case.attention, case.cache.compression), 0)
    programs.add(f"attend {case.name}", _attend, attention, *qkv)
    if hasattr(attention, "attend"):
        programs.add(f"index {case.name}", _index, attention, *qkv)
    keep = functools.partial(_keep, capacity=case.cache.capacity)
    programs.add(f"keep {case.cache.label}", keep, compression, *qkv)


def split(
    programs: Programs,
    case: Case,
    tokens: Array,
    whole: float,
    executed: Executed | None,
    shared: Shared,
    *,
    layers: int,
) -> Figures:
    """Times the parts of a method, and returns the seconds of each in `whole`.

    Args:
        programs: hold what `add_shared` and `add_split` added.
        case: a prompt that is read whole, by all layers.
        tokens: the prompt.
        whole: seconds of the whole prefill.
        executed: by the whole prefill, None of attention without an index.
        shared: of this length.
        layers: the first ones, that are timed.
    """
    call = lambda name, *arguments: programs.get(name, *arguments)(*arguments)
    seconds = lambda name, *arguments: _median(programs.get(name, *arguments), *arguments)
    number, times, pairs = case.subject.config.num_layers, [], 0.0
    x = call("embed", _ends(case.subject), tokens)
    for at in range(min(layers, number)):
        params = _layer(case.subject, at)
        attention, compression = _of_layer((case.attention, case.cache.compression), at)
        qkv = call("project", params, x)
        kv = seconds(f"keep {case.cache.label}", compression, *qkv)
        estimate = 0.0
        if executed is not None:
            estimate = seconds(f"index {case.name}", attention, *qkv)
            index = call(f"index {case.name}", attention, *qkv)
            found = jax.tree.map(lambda leaf: leaf[None], Executed.of(index))
            pairs += float(executed_pairs(found, case.length)[0])
            del index
        times.append((kv, estimate, seconds(f"attend {case.name}", attention, *qkv)))
        if at + 1 < layers:
            x = call("finish", params, x, call(f"attend {case.name}", attention, *qkv))
        del qkv
    kv, estimate, attend = np.mean(times, axis=0)
    scale = float(number)
    if executed is not None:
        scale = len(times) * float(executed_pairs(executed, case.length).sum()) / pairs
    parts = {
        "ends": shared.ends,
        "linear": shared.linear * number,
        "kv": float(kv) * number,
        "index": float(estimate) * number,
        "attention": max(float(attend - estimate), 0.0) * scale,
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


def extrapolate(seconds: float, ends: float, *, timed: int, layers: int) -> float:
    """Seconds of all layers from those of a model of the first ones, of which the ends are some."""
    return ends + (seconds - ends) * layers / timed


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The programs of a model and a length that no attention takes part in."""

    config: DecoderConfig
    length: int
    place: Placement = ONE_DEVICE

    def shapes(self, subject: Subject) -> tuple[Any, Any, Any]:
        """Shapes of the tokens, the residual stream, and a layer's queries, keys and values."""
        tokens = jax.ShapeDtypeStruct((1, self.length), jnp.int32)
        x = jax.eval_shape(self.embed, _ends(subject), tokens)
        return tokens, x, jax.eval_shape(self.project, _layer(subject, 0), x)

    def rows(self, x: Any) -> Any:
        """Rows of the stream that a layer computes at once, or their shape."""
        take = lambda x: x[0, :TOKENS_PER_CHUNK]
        return jax.eval_shape(take, x) if isinstance(x, jax.ShapeDtypeStruct) else take(x)

    def embed(self, params: Any, tokens: Array) -> Array:
        return run_embedding(params, tokens, config=self.config)

    def ends(self, params: Any, tokens: Array) -> tuple[Array, Array]:
        tokens, *_ = self.place.arrange(tokens, None)
        x = self.place.rows(self.embed(params, self.place.rows(tokens)))
        last = self.place.row_at(x, jnp.full(x.shape[0], self.length - 1))
        return x, self.place.logits(run_logits(params, last, config=self.config))

    def linear(self, layer: Any, x: Array) -> Array:
        return self._run(layer, x, lambda *qkv: (mix(*qkv), None))[0]

    def project(self, layer: Any, x: Array) -> tuple[Array, Array, Array]:
        return self._run(layer, x, lambda *qkv: (qkv[0], qkv))[1]

    def finish(self, layer: Any, x: Array, out: Array) -> Array:
        return self._run(layer, x, lambda *qkv: (out, None))[0]

    def _run(self, layer: Any, x: Array, attend: Callable[..., Any]) -> Any:
        # The compiler drops what a program does not return.
        params = {"layers": jax.tree.map(lambda leaf: leaf[None], layer)}
        rope_length = jnp.full((1,), self.length, jnp.int32)
        return run_layer(params, 0, x, rope_length, config=self.config, attend=attend)


def _attend(attention: Any, q: Array, k: Array, v: Array) -> Array:
    return attention(q, k, v)


def _index(attention: Any, q: Array, k: Array, v: Array) -> Any:
    # The compiler drops the attention, whose output is not used.
    return attention.attend(q, k, v)[1]


def _keep(compression: Any, q: Array, k: Array, v: Array, *, capacity: int) -> list[Array]:
    kept = (k, v) if compression is None else compression(q, k, v)[:2]
    room = lambda x: ((0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0))
    return [jnp.pad(x, room(x)) for x in kept]


def _of_layer(tree: Any, at: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[at], tree)


def _layer(subject: Subject, at: int) -> Any:
    return _of_layer(subject.params["layers"], at)


def _ends(subject: Subject) -> Any:
    return {name: leaf for name, leaf in subject.params.items() if name != "layers"}


def _median(call: Callable[..., Any], *arguments: Any) -> float:
    return float(np.median(time_calls(call, *arguments)))
