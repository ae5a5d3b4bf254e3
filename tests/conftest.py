"""Settings for all tests."""

import warnings

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `compile_faster` compiles with most optimisations off, its fixtures too."""
    faster = item.get_closest_marker("compile_faster") is not None
    jax.config.update("jax_disable_most_optimizations", faster)
    try:
        return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
