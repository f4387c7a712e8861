"""What the default device is, for choosing implementations, and for records: which code runs."""

import os
import platform
import subprocess
import time
from pathlib import Path

import jax


def default_device() -> str:
    """Kind of the device that computations run on unless placed elsewhere."""
    return _device().device_kind


def on_cpu() -> bool:
    """Whether the default device is a CPU."""
    return _device().platform == "cpu"


def not_hopper() -> str | None:
    """Why Hopper's kernels cannot run on the default device, None if they can."""
    device = _device()
    if device.platform != "gpu":
        return f"needs a GPU of compute capability 9.0, the default device is {device.device_kind}"
    if device.compute_capability != "9.0":
        return (
            "needs a GPU of compute capability 9.0, the default device "
            f"({device.device_kind}) has {device.compute_capability}"
        )
    return None


def stamp(module: str, arguments: list[str]) -> dict[str, str]:
    """Where and with what a record was made: device, versions, commit, date and command."""
    return {
        "device": default_device(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": git_revision() or "",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m {module} " + " ".join(arguments),
    }


def git_revision() -> str | None:
    """The commit of the source tree, with `+changes` if files differ; None if unknown.

    A tree that was copied without its repository takes it from `MINFERENCE_REVISION`.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("MINFERENCE_REVISION")
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
