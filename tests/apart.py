"""Tests that need a process of their own, as JAX fixes how it compiles and for what devices."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run_tests(path, *arguments, environment):
    """What pytest says of `path`, relative to tests/, in a process with this environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, "--capture=sys", *arguments, f"tests/{path}"],  # XLA writes past sys.stderr
        cwd=ROOT,
        env={name: x for name, x in environment.items() if not name.startswith("PYTEST_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_passed(run):
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
