"""Mistakes of the person at the keyboard, told apart from faults of the program."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

# What there is to do when a device's memory does not suffice.
WAYS_OUT = (
    "--kv-cache int8 or snapkv:4096 keeps less of the prompt (prefill: --kv-cache none nothing), "
    "--chunk-size 16384 computes fewer tokens at once, --dtype bfloat16 halves a float32 model"
)


class UserError(Exception):
    """Input that cannot be used: shown as one line, without a traceback."""


def one_line(error: BaseException | str) -> str:
    """Returns an error's text on a single line."""
    text = str(error) or type(error).__name__
    return " ".join(text.split())


@contextlib.contextmanager
def reported_as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of the given kinds, raised inside the block, into `UserError`.

    Only put around calls whose errors of these kinds speak about the user's input.
    """
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def run_reporting_errors(command: Callable[[], None]) -> int:
    """Runs a command; returns the exit code, 2 after a `UserError` told on standard error.

    Memory that ran out is told in the same way: what was measured before is in the files.
    """
    try:
        with _memory_told():
            command()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition(" [")[0]
        raise UserError(
            f"{what}. A smaller --batch-size, if there is one, helps; {WAYS_OUT}; "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives JAX more of a GPU than three quarters, and "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false can split what is free into pieces too small"
        ) from error


def parse_reporting_errors[Parsed](parse: Callable[[], Parsed]) -> Parsed:
    """Runs a tyro parser, its complaint made a one-line `UserError`; `--help` passes through."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_without_box(complaint.getvalue())) from None


def _without_box(complaint: str) -> str:
    """Returns the message of tyro's boxed complaint, up to its first rule, and where to look."""
    # The box is drawn in ASCII where the terminal's encoding has no lines.
    lines = [re.sub(r"[│╭╮╰╯|+]", "", line).strip() for line in complaint.splitlines()[1:]]
    body = []
    for line in lines:
        if not line or not set(line) <= {"─", "-"}:
            body.append(line)
        elif body:
            break
    return one_line(" ".join(body).replace("(required)", "")) + " (see --help)"


def check_writable(path: Path, *, folder: bool) -> None:
    """Raises UserError now if `path` could not be written later; creates missing folders.

    Args:
        path: a folder that results go into, or a file that results are appended to.
        folder: which of the two it is.
    """
    directory = path if folder else path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".minference-write-test" if folder else path
        existed = probe.exists()
        with probe.open("a"):
            pass
        if not existed:
            probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror or error}); choose another path"
        ) from error
