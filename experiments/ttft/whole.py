"""The time of a whole prefill: memory asked for beforehand, compiled apart, warm runs."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console

from experiments.common.errors import UserError
from experiments.common.kv_cache import PrefillCacheOptions
from experiments.common.measure import peak_memory, stage
from experiments.common.memory import check_room
from experiments.ttft.attention import observe_executed
from experiments.ttft.digest import digest_of
from experiments.ttft.rows import Figures
from experiments.ttft.subject import Subject
from minference_jax.kv_cache import KVCompression
from minference_jax.pairs import Executed
from minference_jax.sharding import natural_order
from models.common.cache import kept_tokens
from models.common.decoder import prefill
from models.common.memory import PrefillMemory, compiled_bytes, device_memory, estimate_prefill
from models.common.placement import Placement
from pallas_kernels.common.timing import Programs

# Room in the cache for an answer.
_NEW_TOKENS = 128
# A run that takes longer is its own warm-up: what a first call costs besides is nothing beside it.
# Not so where few layers stand for all: what is too much is then multiplied.
_LONG = 5.0
# On several devices it connects them, too, which takes seconds.
_LONG_ON_MESH = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What is kept of a prompt.

    Attributes:
        label: as the command line names it.
        compression: of the model's layers, None for everything.
        capacity: tokens that the cache can hold.
        memory: estimate of the prefill with it.
    """

    label: str
    compression: KVCompression | None
    capacity: int
    memory: PrefillMemory


def choose_cache(
    labels: Sequence[str], subject: Subject, attention: Any, length: int, chunk_size: int | None
) -> Cache:
    """Returns the first way to keep the prompt that fits the device by estimate.

    Raises:
        UserError: none fits, or one cannot be had in chunks.
    """
    config = subject.config
    for label in labels:
        compression = compression_of(label, config.num_layers)
        if chunk_size is not None and chunk_size < length and compression is not None:
            raise UserError(
                f"--kv-cache {label} needs the whole prompt at once; leave out --chunk-size, or "
                "take --kv-cache all"
            )
        kept = kept_tokens(compression, length)
        room = _NEW_TOKENS if kept else 0
        memory = estimate_prefill(
            subject.params, config=config, attention_fn=attention, batch=1, length=length,
            new_tokens=room, chunk_size=chunk_size, compression=compression,
        )  # fmt: skip
        limit = device_memory()
        if limit is None or memory.peak <= limit or label == labels[-1]:
            check_room(memory, limit)
            return Cache(label=label, compression=compression, capacity=kept + room, memory=memory)
    raise UserError("--kv-cache must name at least one way to keep the prompt, for example all")


def compression_of(label: str, num_layers: int) -> KVCompression | None:
    """What the label of a cache stands for; raises UserError if it is none."""
    options = PrefillCacheOptions(kv_cache=None if label == "all" else label)
    return options.build(num_layers=num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A prefill to be timed.

    Attributes:
        name: what to call it while it runs.
        subject: the model, perhaps with its first layers only.
        length: tokens of the prompt.
        attention: of all these layers.
        cache: what is kept.
        chunk_size: tokens read at once, all if None.
    """

    name: str
    subject: Subject
    length: int
    attention: Any
    cache: Cache
    chunk_size: int | None

    @property
    def place(self) -> Placement:
        """Where the prefill runs."""
        return Placement.of(self.attention)

    @property
    def devices(self) -> int:
        """How many devices share the prefill."""
        return 1 if self.place.attention is None else self.place.attention.mesh.size

    @property
    def everywhere(self) -> NamedSharding | None:
        """How arrays lie that all devices have; None on one device."""
        if self.place.attention is None:
            return None
        return NamedSharding(self.place.attention.auto_mesh, PartitionSpec())

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the program: parameters, shape of the tokens, attention, compression."""
        tokens = jax.ShapeDtypeStruct((1, self.length), jnp.int32, sharding=self.everywhere)
        return self.subject.params, tokens, self.attention, self.cache.compression

    def read(self, params: Any, tokens: Array, attention: Any, compression: Any) -> Any:
        """The prefill: logits, cache, what was executed."""
        return prefill(
            params,
            tokens,
            config=self.subject.config,
            attention_fn=attention,
            capacity=self.cache.capacity,
            rope_length=jnp.full((1,), self.length + _NEW_TOKENS, jnp.int32),
            chunk_size=self.chunk_size,
            observe=observe_executed,
            compression=compression,
        )


def add(programs: Programs, case: Case) -> None:
    """Adds what `measure` runs."""
    programs.add(f"prefill {case.name}", case.read, *case.arguments)


def measure(
    programs: Programs, case: Case, tokens: Array, *, repeats: int, always_warm: bool,
    console: Console,
) -> tuple[Figures, Executed | None]:  # fmt: skip
    """Times a prefill, and returns what its attention executed, `[layers, ...]`.

    `seconds` is the median of `runs`; where the first run is long it is the only one, and
    `warm` is false, unless it is `always_warm`. `peak_bytes` is what the device says, of several
    the one with most, None unless this program raised it: it is never reset, so that smaller
    programs after larger ones do not show. The estimate and `program_bytes` are of each device,
    `cache_bytes` of all.
    """
    program = f"prefill {case.name}"
    compiled = programs.get(program, *case.arguments)
    params, _, *rest = case.arguments
    if case.everywhere is not None:
        tokens = jax.device_put(tokens, case.everywhere)
    needed = compiled_bytes(compiled)
    check_room(needed, device_memory())
    before = peak_memory(case.devices)
    long = _LONG if case.devices == 1 else _LONG_ON_MESH
    found: list[Any] = []

    def run() -> None:
        found.clear()  # the caches of two runs need not exist at once
        found.append(jax.block_until_ready(compiled(params, tokens, *rest)))

    with stage(console, f"{case.name}: reading"):
        runs, warm = time_runs(run, repeats, long=math.inf if always_warm else long)
    [(logits, kept, executed)] = found
    if not bool(jnp.all(jnp.isfinite(logits))):
        raise UserError(f"{case.name}: logits that are no numbers; are the weights right?")
    peak = peak_memory(case.devices)
    figures = {
        "seconds": float(np.median(runs)),
        "runs": runs,
        "warm": warm,
        "compile_seconds": programs.seconds_to_compile(program, *case.arguments),
        "kv_cache": case.cache.label,
        "cache_bytes": kept.keys.nbytes + kept.values.nbytes,
        "estimate_bytes": case.cache.memory.peak,
        "program_bytes": needed,
        "peak_bytes": peak if peak > before else None,
        "digest": digest_of(np.asarray(logits[0])),
    }
    if executed is not None and case.place.parts > 1:
        executed = in_order(executed, case.place.parts)
    return figures, executed


def time_runs(
    run: Callable[[], Any], repeats: int, long: float = _LONG
) -> tuple[list[float], bool]:
    """Seconds of each run after one to warm up, and true; of that one alone if it is long."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    if first > long:
        return [first], False
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds, True


def in_order(executed: Executed, parts: int) -> Executed:
    """What was executed of a prompt, from the order of so many devices to that of the prompt."""
    order = natural_order(executed.count.shape[-1], parts)
    return executed._replace(count=jnp.asarray(np.asarray(executed.count)[..., order]))


def counts_of(executed: Executed, length: int) -> np.ndarray:
    """Key tiles of every query tile of a whole prompt [layers, heads, tiles]."""
    block_q, _ = _blocks(executed)
    # [layers, (chunks,) batch, heads, tiles]
    counts = np.asarray(executed.count)[..., 0, :, :]
    if counts.ndim == 4:
        counts = np.moveaxis(counts, 1, 2).reshape(counts.shape[0], counts.shape[2], -1)
    return counts[:, :, : -(-length // block_q)]


def executed_pairs(executed: Executed, length: int) -> np.ndarray:
    """(Query, key) pairs that each layer's kernel computes [layers]: whole tiles, and columns.

    Columns are taken to lie evenly, and outside of a query tile's key tiles unless these are all.
    """
    block_q, block_kv = _blocks(executed)
    counts, dense = counts_of(executed, length), _dense_counts(executed, length)
    columns = np.asarray(executed.columns).reshape(counts.shape[0], -1, counts.shape[1])[
        :, -1, :, None
    ]
    columns = np.where(counts < dense, columns * (dense / dense[-1]), 0)
    return block_q * (counts * block_kv + columns).sum(axis=(1, 2), dtype=np.float64)


def executed_share(executed: Executed, length: int) -> float:
    """Executed pairs over those that dense attention executes."""
    dense = float(np.prod(_blocks(executed))) * _dense_counts(executed, length).sum()
    pairs = executed_pairs(executed, length).mean()
    return float(pairs / executed.count.shape[-2] / dense)


def _blocks(executed: Executed) -> tuple[int, int]:
    return int(np.max(executed.block_q)), int(np.max(executed.block_kv))


def _dense_counts(executed: Executed, length: int) -> np.ndarray:
    """Key tiles of every query tile of dense attention [tiles]."""
    block_q, block_kv = _blocks(executed)
    ends = np.minimum((np.arange(-(-length // block_q)) + 1) * block_q, length)
    return -(-ends // block_kv)
