"""These tests need eight devices, and JAX fixes their number when its backend starts.

They run only in a process of their own, `pytest tests/sharding`, as `tests/test_sharding.py` starts
it; in a run of more than this folder they are left out.
"""

import pathlib
import sys

import jax

DEVICES = 8
HERE = pathlib.Path(__file__).parent

sys.path.append(str(HERE.parents[1] / "benchmarks"))  # of which tests use the counter, hlo.py


def runs_alone(config):
    root = config.invocation_params.dir
    paths = [root.joinpath(arg.partition("::")[0]) for arg in config.args]
    return all(path.resolve().is_relative_to(HERE) for path in paths)


def pytest_configure(config):
    if runs_alone(config):
        jax.config.update("jax_num_cpu_devices", DEVICES)


def pytest_ignore_collect(collection_path, config):
    return None if runs_alone(config) else True
