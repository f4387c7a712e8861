"""Strict JAX flags for every test, four CPU devices for sharding tests, and the `gpu` marker."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compilation of small programs. Modules that run real weights switch
# the optimisations on again.
_QUICK = jax.default_backend() == "cpu"
jax.config.update("jax_disable_most_optimizations", _QUICK)


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; the default JAX backend here is the CPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def optimised():
    """Compiles as users do: for modules that run real weights, where computing takes longest."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", _QUICK)


@pytest.fixture
def as_users_see_it():
    """Switches the test suite's shape checks off: users get the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
