"""`import orthax` is cheap: no JAX backend, no Flax, no Equinox, little time."""

import json
import statistics
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
import optax
before, start = set(sys.modules), time.process_time()
import orthax
seconds = time.process_time() - start
from jax._src import xla_bridge
print(json.dumps({
    "seconds": seconds,
    "backend": xla_bridge.backends_are_initialized(),
    "modules": sorted(sys.modules),
    "added": sorted(set(sys.modules) - before),
}))
"""


@pytest.fixture(scope="module")
def runs():
    """What three fresh interpreters report."""
    results = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))
    return results


def test_it_starts_no_backend(runs):
    assert not runs[0]["backend"]


def test_it_does_not_import_flax_equinox_or_what_only_an_extra_brings(runs):
    packages = {module.partition(".")[0] for module in runs[0]["modules"]}
    assert not packages & {"flax", "equinox", "orbax", "grain", "matplotlib", "tyro", "pytest"}
    assert not {"orthax.nn", "orthax.eqx"} & set(runs[0]["modules"])


def test_it_adds_less_than_a_fifth_of_a_second_to_importing_optax(runs):
    """Processor time, which other processes on the machine hardly change."""
    assert statistics.median(run["seconds"] for run in runs) < 0.2, runs[0]["added"]
