"""Times every adaptive estimator beside its attention: `python -m minference_jax.adaptive.measure`.

For one layer of Llama-3-8B's shape, on planted queries and keys (`planted.py`). Timed are the
estimate alone, and the attention kernel over the index that it found; dense attention through the
same kernel and vertical-slash lines give the scale. Programs of a length are compiled side by side
before anything is timed. An estimator that fails leaves its error in its record.
"""

import argparse
import dataclasses
import functools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array

from minference_jax.adaptive import (
    AdaptiveAttention,
    BlockDiagonals,
    BlockThreshold,
    Estimator,
    FlexPrefill,
    Layout,
    WithColumns,
    XAttention,
)
from minference_jax.adaptive.planted import planted_qkv
from minference_jax.index import build_index, dense_index
from minference_jax.index.lines import LAST_Q
from minference_jax.patterns import HeadPatterns, VerticalSlash
from minference_jax.search.cost import work_of
from pallas_kernels import BlockSparseIndex, block_sparse_attention
from pallas_kernels.common.environment import default_device, git_revision
from pallas_kernels.common.timing import Programs, time_calls

_ALPHA, _COLUMNS, _TAU, _GAMMA = 0.05, 512, 0.9, 0.95


@dataclasses.dataclass(frozen=True)
class Case:
    """How an index is found: `estimate(given, q, k)`, and what the record says of it."""

    name: str
    estimate: Callable[[Any, Array, Array], BlockSparseIndex]
    given: Any = ()
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases(heads: int) -> list[Case]:
    """Dense attention and lines for the scale, then the estimators."""
    lines = VerticalSlash(vertical_size=1000, slash_size=6096)
    patterns = HeadPatterns.uniform(lines, num_layers=1, num_heads=heads)
    of_lines = functools.partial(
        build_index, block_q=128, block_kv=96, last_q=LAST_Q, dense_above=0.9, stagger=True
    )
    threshold = lambda rows: BlockThreshold(_ALPHA, pooled_rows=rows)
    shared = Layout(shared=True)
    return [
        Case("dense", lambda _, q, k: _dense_like(q, k, 128, 128)),
        Case("vertical-slash", of_lines, jax.tree.map(lambda x: x[0], patterns),
             dataclasses.asdict(lines)),
        *(_adaptive(f"threshold-{rows}", threshold(rows)) for rows in (1, 4, 16)),
        *(_adaptive(f"threshold-{rows}-columns", WithColumns(threshold(rows), _COLUMNS))
          for rows in (4, 16)),
        *(_adaptive(f"x-attention-{stride}", XAttention(_TAU, stride=stride))
          for stride in (16, 8)),
        _adaptive("flex-prefill", FlexPrefill(_GAMMA)),
        _adaptive("block-diagonals", BlockDiagonals(64)),
        _adaptive("threshold-16-shared", threshold(16), shared),
        _adaptive("x-attention-16-shared", XAttention(_TAU, stride=16), shared),
    ]  # fmt: skip


def _adaptive(name: str, estimator: Estimator, layout: Layout | None = None) -> Case:
    attention = AdaptiveAttention(estimator, layout or Layout())
    given = jax.tree.map(jnp.asarray, attention)
    return Case(name, AdaptiveAttention.estimate, given, dataclasses.asdict(attention))


def measure_length(options: argparse.Namespace, length: int) -> Iterator[dict[str, Any]]:
    """A record for each case, in their order, on prompts of one length."""
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.head_dim}
    draw = functools.partial(planted_qkv, length=length, **sizes)
    key = jax.random.key(options.seed)
    chosen = [case for case in cases(options.heads) if case.name in options.estimators]
    programs = Programs()
    programs.add("draw", draw, key)
    shapes = jax.eval_shape(draw, key)
    failed: dict[str, Exception] = {}
    for case in chosen:
        try:
            _add(programs, case, *shapes)
        except Exception as error:
            failed[case.name] = error
    programs.compile(keep_going=True)
    q, k, v = programs.get("draw", key)(key)
    dense = None
    for case in chosen:
        record: dict[str, Any] = {"length": length, **sizes}
        record |= {"estimator": case.name, "parameters": case.parameters}
        try:
            if case.name in failed:
                raise failed[case.name]
            for figures in _time(programs, case, q, k, v):
                record |= figures
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:300]
        if case.name == "dense":
            dense = record.get("attention_ms")
        if dense and "attention_ms" in record:
            record["of_dense"] = (record["estimate_ms"] + record["attention_ms"]) / dense
        yield record


def _add(programs, case, q, k, v):
    programs.add(case.name, case.estimate, case.given, q, k)
    index = jax.eval_shape(case.estimate, case.given, q, k)
    programs.add("attend", block_sparse_attention, q, k, v, index)
    programs.add("shares", _shares, index, q, k)


def _time(programs, case, q, k, v) -> Iterator[dict[str, Any]]:
    """Figures of a case, group after group, so that an error does not lose those before it."""
    given = (case.given, q, k)
    estimate = programs.get(case.name, *given)
    yield {
        "compile_s": programs.seconds_to_compile(case.name, *given),
        "temporary_bytes": estimate.memory_analysis().temp_size_in_bytes,
    }
    kept: list[BlockSparseIndex] = []
    yield {"estimate_ms": _milliseconds(estimate, *given, check=kept.append)}
    [index] = kept
    # The count first: it is told even where the attention fails.
    executed, fallen = jax.device_get(programs.get("shares", index, q, k)(index, q, k))
    yield {
        "executed": float(executed.mean()),
        "executed_by_head": [round(float(x), 4) for x in executed],
        "dense_tiles": float(fallen),
    }
    attend = programs.get("attend", q, k, v, index)
    yield {"attention_compile_s": programs.seconds_to_compile("attend", q, k, v, index)}
    yield {"attention_ms": _milliseconds(attend, q, k, v, index)}


def _milliseconds(call, *arguments, check=None):
    return float(np.median(time_calls(call, *arguments, check=check))) * 1e3


def _shares(index, q, k):
    """Tiles that each head executes over those of dense attention; query tiles that run densely.

    The latter are counted in the second half of the prompt.
    """
    work = work_of(index, q.shape[1], None, "flops")
    everything = _dense_like(q, k, index.block_q, index.block_kv)
    dense = index.count >= everything.count
    return work.sparse / work.dense, jnp.mean(dense[..., dense.shape[2] // 2 :])


def _dense_like(q, k, block_q, block_kv):
    return dense_index(
        1, q.shape[2], q.shape[1], k.shape[1], block_q=block_q, block_kv=block_kv
    )  # fmt: skip


def _environment(arguments: list[str]) -> dict[str, Any]:
    return {
        "device": default_device(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "git": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m minference_jax.adaptive.measure " + " ".join(arguments),
    }


def _line(record: dict[str, Any]) -> str:
    text = f"{record['length']:>8} {record['estimator']:<22}"
    if "attention_ms" in record:
        estimate, attention = record["estimate_ms"], record["attention_ms"]
        text += f" estimate {estimate:>9.2f} ms, attention {attention:>9.2f} ms"
        text += f", ratio {estimate / attention:.3f}, executed {record['executed']:.3f}"
    if "of_dense" in record:
        text += f", together {record['of_dense']:.3f} x dense"
    return text + (f" {record['error']}" if "error" in record else "")


def main(arguments: list[str] | None = None) -> None:
    """Prints one line for each length and estimator, and appends a JSON line to the output."""
    names = [case.name for case in cases(1)]
    parser = argparse.ArgumentParser(
        prog="python -m minference_jax.adaptive.measure", description=__doc__
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 1048576])
    parser.add_argument("--estimators", nargs="+", choices=names, default=names)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_args(arguments)
    environment = _environment(sys.argv[1:] if arguments is None else arguments)
    print(environment, flush=True)
    for length in options.lengths:
        for record in measure_length(options, length):
            print(_line(record), flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record | environment) + "\n")


if __name__ == "__main__":
    main()
