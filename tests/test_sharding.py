"""Runs `tests/sharding` in a process of its own, which has eight devices."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "sharding"


@pytest.mark.parametrize("chosen", ["auto", "not auto"])  # two processes, for two cores
def test_the_tests_on_eight_devices_pass(chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_") and name != "XLA_FLAGS"
    }
    run = subprocess.run(
        [*command, "-k", chosen, str(FOLDER)],
        cwd=FOLDER.parent.parent,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
