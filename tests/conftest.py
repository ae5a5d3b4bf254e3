"""Settings for all tests."""

import os
import sys
import warnings

import compilation
import pytest
from part import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
)

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py said how it is to compile")
compilation.compile_faster(os.environ)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
