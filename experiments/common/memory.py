"""The memory that a prompt will need, told before its model is loaded."""

from rich.console import Console
from rich.table import Table

from experiments.common.errors import WAYS_OUT, reported_as_user_error
from models.common.layers import TOKENS_PER_CHUNK
from models.common.memory import PrefillMemory, check_fits, gib

_PARTS = {
    "weights": "weights",
    "cache": "keys and values kept",
    "stream": "residual stream, rotary tables",
    "qkv": "queries, keys and values of a layer",
    "output": "attention output of a layer",
    "index": "index of a layer's attention",
    "layer": "copies of one layer's arrays",
    "chunk": f"MLP of {TOKENS_PER_CHUNK:,} tokens",
    "logits": "logits of the last token",
}


def check_room(memory: PrefillMemory | int, limit: int | None) -> None:
    """Raises UserError with the ways out if the device has less memory, see `device_memory`."""
    with reported_as_user_error(MemoryError):
        check_fits(memory, limit, ways_out=WAYS_OUT)


def show_estimate(
    console: Console,
    memory: PrefillMemory,
    *,
    length: int,
    limit: int | None,
    mesh: str | None,
) -> None:
    """Prints a prefill's parts, what it needs at once, and what the device has."""
    of_each = "" if mesh is None else f" for each device of {mesh}"
    table = Table(title=f"memory of a prefill of {length:,} tokens, estimated{of_each}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in memory._asdict().items():
        table.add_row(_PARTS[part], f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("at once", f"{memory.peak / 2**30:.2f}")
    table.add_row("JAX's share of the device", "no limit" if limit is None else gib(limit))
    console.print(table)
