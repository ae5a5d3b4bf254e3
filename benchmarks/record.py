"""What benchmarks share: matrices, timing in turns, tables, and data files with their origin."""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import orthax
from orthax.linalg import coefficients

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION, MLP = ("query", "key", "value", "out"), ("up", "down")
PACKAGES = ("jax", "jaxlib", "optax", "flax", "grain", "numpy")


def kernels(shapes: Mapping[str, tuple[int, int]], layers: int) -> dict[str, Any]:
    """Abstract float32 parameters as Flax has them: the given kernels in every layer."""
    return {
        f"layer_{i}": {
            name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
            for name, shape in shapes.items()
        }
        for i in range(layers)
    }


def gpt_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Shapes of one transformer block's kernels."""
    attention = dict.fromkeys(ATTENTION, (width, width))
    return {**attention, "up": (width, 4 * width), "down": (4 * width, width)}


def momentum_spectra(prefix: str, names: Sequence[str]) -> list[np.ndarray]:
    """Singular values in benchmarks/data/real_spectra.npz, see benchmarks/coefficients.py.

    Args:
      prefix: Width and step, such as "mom768|step60|".
      names: Kernels, of ATTENTION and MLP; all blocks that are stored.
    """
    stored = np.load(ROOT / "benchmarks" / "data" / "real_spectra.npz")
    short = {"query": "q", "key": "k", "value": "v", "out": "o"}
    wanted = [f"['{short.get(name, name)}']" for name in names]
    return [
        stored[key]
        for key in stored.files
        if key.startswith(prefix) and any(name in key for name in wanted)
    ]


def stretched(spectrum: np.ndarray, size: int) -> np.ndarray:
    """The spectrum's quantiles at another number of singular values."""
    old, new = np.linspace(0, 1, spectrum.size), np.linspace(0, 1, size)
    return np.exp(np.interp(new, old, np.log(spectrum)))


def with_spectrum(
    spectrum: np.ndarray, shape: tuple[int, int], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with random singular vectors, in float64, and its polar factor.

    Args:
      spectrum: Its singular values, as many as the shorter side; zeros are allowed.
      shape: Of the matrix.
      generator: Of the singular vectors.
    """
    size = min(shape)
    u, v = (np.linalg.qr(generator.standard_normal((side, size)))[0] for side in shape)
    return (u * spectrum) @ v.T, u @ v.T


def optax_quintic(x: jax.Array, **options: Any) -> jax.Array:
    """What optax.contrib.muon orthogonalises with, its defaults unless told otherwise."""
    from optax.contrib._muon import orthogonalize_via_newton_schulz  # private: for those who ask

    defaults: dict[str, Any] = {"ns_coeffs": jnp.asarray(coefficients.MUON[0])}
    return orthogonalize_via_newton_schulz(x, **(defaults | options))


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, which take turns; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def speeds(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, list[float]]:
    """How many times as fast as the baseline each is: median, least and most over the rounds."""
    found = {}
    for name, seconds in times.items():
        ratios = [base / own for base, own in zip(times[baseline], seconds, strict=True)]
        found[name] = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return found


def milliseconds(seconds: Sequence[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(seconds), 2)


def live_bytes(make: Callable[[], Any]) -> int:
    """Bytes that come to life on the device when something is made."""
    before = sum(array.nbytes for array in jax.live_arrays())
    made = jax.block_until_ready(make())
    after = sum(array.nbytes for array in jax.live_arrays())
    del made
    return after - before


def origin() -> dict[str, Any]:
    """Device, versions and commit of a measurement."""
    return {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }


def versions() -> dict[str, str]:
    """Of Python, orthax and the packages that decide results; those installed."""
    found = {"python": platform.python_version(), "orthax": orthax.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name() -> str:
    """The accelerator's name, or the processor's and the number of cores in use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_model()}, {cores} cores"


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout, with `+` if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "orthax")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lines up rows of equal keys under their titles."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def write(name: str, data: dict[str, Any]) -> Path:
    """Writes data with its origin to benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**origin(), **data}, indent=1) + "\n")
    return path
