"""Times of one attention layer: the whole as a model runs it, and its parts."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import minference_jax as mj
from minference_jax.attention import LAST_Q
from minference_jax.index.lines import last_query_scores
from minference_jax.patterns import Kind
from pallas_kernels import BlockSparseIndex
from pallas_kernels.block_sparse_attention.api import Implementation
from pallas_kernels.block_sparse_attention.measure import (
    add_kernel,
    executed_keys,
    judge,
    measure_kernel,
)
from pallas_kernels.common.timing import Programs, Shaped, time_calls


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCase:
    """An attention layer to time.

    Attributes:
        name: what the records call it.
        attention: sparse attention of one layer.
        split: also time its parts.
    """

    name: str
    attention: mj.SparseAttention | mj.AdaptiveAttention
    split: bool

    @property
    def estimates(self) -> bool:
        """Whether the last queries' scores are all that the index is estimated from."""
        if isinstance(self.attention, mj.AdaptiveAttention):
            return False
        return bool(np.any(np.asarray(self.attention.patterns.kind) == Kind.VERTICAL_SLASH))


def table_layers(num_heads: int, implementation: Implementation | None) -> Iterator[LayerCase]:
    """Layers of one pattern with the budgets of the shipped configurations.

    Heads with up to 1024 columns have this capacity, as in a configuration that mixes them, and so
    share one program.
    """

    def case(name, pattern, *, split=False, max_columns=None):
        patterns = mj.HeadPatterns.from_grid([[pattern] * num_heads], max_columns=max_columns)
        attention = mj.SparseAttention(patterns, implementation=implementation).layer(0)
        return LayerCase(name=name, attention=attention, split=split)

    lines = lambda columns, slashes: mj.VerticalSlash(vertical_size=columns, slash_size=slashes)
    yield case("lines-1000-6096", lines(1000, 6096), max_columns=1024, split=True)
    yield case("lines-500-700", lines(500, 700), max_columns=1024)
    yield case("lines-3500-100", lines(3500, 100), max_columns=3584)
    a_shape = mj.AShape(sink_size=128, window_size=1024)
    yield case("a_shape-128-1024", a_shape, max_columns=1024)
    yield case("blocks-100", mj.BlockSparse(num_blocks=100))


def add_layer(programs: Programs, q: Shaped, k: Shaped, v: Shaped, case: LayerCase) -> None:
    """Adds what `measure_layer` runs."""
    programs.add("layer", _attend, case.attention, q, k, v)
    index = index_shapes(case, q, k, v)
    add_kernel(programs, q, k, v, index, case.attention.implementation, alone=case.split)
    if case.split:
        programs.add("index", _index, case.attention, q, k, v)
        if case.estimates:
            programs.add("scores", _scores, q, k)


def index_shapes(case: LayerCase, q: Shaped, k: Shaped, v: Shaped) -> BlockSparseIndex:
    """Shapes of the index that the layer builds."""
    return jax.eval_shape(_index, case.attention, q, k, v)


def measure_layer(programs: Programs, q: Array, k: Array, v: Array, case: LayerCase) -> dict:
    """Checks and times a layer; `programs` holds what `add_layer` added.

    Times in milliseconds: `ms` is the whole, and with `split` `estimation_ms`, `index_ms`
    (estimation inside), `plan_ms`, `gather_ms` and `kernel_ms` (attention over the given index with
    plan and gather inside).

    Raises:
        WrongResult: a sampled query tile is not attention over the visited keys.
    """
    indices = []
    figures: dict = {}

    def check(result):
        out, index = result
        figures.update(judge(programs.get("gate", q, q, k, v, index)(out, q, k, v, index)))
        indices.append(index)

    runs = time_calls(
        programs.get("layer", case.attention, q, k, v), case.attention, q, k, v, check=check
    )
    [index] = indices
    executed = executed_keys(programs, index)
    figures |= {
        "ms": np.median(runs) * 1e3,
        "runs_ms": [seconds * 1e3 for seconds in runs],
        "tflops": 4 * q.shape[3] * executed / np.median(runs) / 1e12,
        "keys_per_row": executed / q.shape[1] / q.shape[2],
        "index_bytes_per_head": sum(x.nbytes for x in jax.tree.leaves(index)) // q.shape[2],
        "block_kv": index.block_kv,
        "capacities": [index.entries.shape[2], index.columns.shape[2]],
    }
    if case.split:
        alone = measure_kernel(programs, q, k, v, index)
        figures["kernel_ms"] = alone["ms"]
        figures |= {part: alone[part] for part in ("plan_ms", "gather_ms")}
        figures["index_ms"] = _milliseconds(programs, "index", case.attention, q, k, v)
        if case.estimates:
            figures["estimation_ms"] = _milliseconds(programs, "scores", q, k)
    return figures


def _milliseconds(programs: Programs, name: str, *arguments) -> float:
    return float(np.median(time_calls(programs.get(name, *arguments), *arguments))) * 1e3


def _attend(attention, q, k, v):
    return attention.attend(q, k, v)


def _index(attention, q, k, v):
    if isinstance(attention, mj.AdaptiveAttention):
        return attention.estimate(q, k)
    # The compiler drops the attention, whose output is not used, outside of a conditional.
    return dataclasses.replace(attention, break_even=0).attend(q, k, v)[1]


def _scores(q, k):
    return last_query_scores(
        q, k, lengths=jnp.full((1,), k.shape[1]), q_offset=jnp.int32(0), last_q=LAST_Q
    )
