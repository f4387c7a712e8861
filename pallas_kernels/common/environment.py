"""What the default device is, for choosing implementations and for records of measurements."""

import platform
import subprocess
import time

import jax


def default_device() -> str:
    """Kind of the device that computations run on unless placed elsewhere."""
    return _device().device_kind


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
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": default_device(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m {module} " + " ".join(arguments),
    }


def _device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
