"""How long does the jitted update of many matrices take to compile, and how much memory to run?

    python benchmarks/compile_time.py

192 leaves of (64, 64), and GPT-2's matrices (width 768) at 12 and 48 layers, for
optax.contrib.muon and orthax, in one process, in turn. Shapes only: nothing is computed. Temporary
memory is what XLA reserves beyond arguments and results; the state is donated. "target" is what
orthax.muon shall reach beside optax.contrib.muon. Prints a table and writes
benchmarks/results/compile_time.json.
"""

import statistics
import time
from typing import Any, NamedTuple

import jax
import optax
import record
import tyro

import orthax
from orthax.linalg import newton_schulz

BASELINE = "optax.contrib.muon"
OPTIMIZERS = {
    BASELINE: optax.contrib.muon(1e-3),
    "orthax.muon": orthax.muon(1e-3),
    "orthax.muon, exact": orthax.muon(1e-3, orthogonalizer=orthax.orthogonalize(accuracy="exact")),
    "orthax.muon, newton_schulz": orthax.muon(
        1e-3, orthogonalizer=orthax.orthogonalize(newton_schulz)
    ),
    "orthax.muon, newton_schulz, stack=False": orthax.muon(
        1e-3, orthogonalizer=orthax.orthogonalize(newton_schulz, stack=False)
    ),
    "optax.adamw": optax.adamw(1e-3),
}


class Workload(NamedTuple):
    """A model and how it is measured."""

    params: dict[str, Any]
    rounds: int
    time_target: float  # orthax.muon's over optax.contrib.muon's
    memory_target: float | None


class Measurement(NamedTuple):
    """Of one jitted update."""

    seconds: float  # to trace and compile
    program: int  # bytes of StableHLO
    memory: int  # bytes of temporary memory


def workloads(rounds: int, smoke: bool) -> dict[str, Workload]:
    """By title; the largest, where optax takes half a minute, is measured in fewer rounds."""
    gpt = record.gpt_shapes(64 if smoke else 768)
    small = record.kernels({"dense": (64, 64)}, 8 if smoke else 192)
    found = {
        "192 of (64, 64)": Workload(small, rounds, 0.3, None),
        "GPT-2, 12 layers": Workload(record.kernels(gpt, 1 if smoke else 12), rounds, 1.0, 0.4),
    }
    if not smoke:
        deep = record.kernels(gpt, 48)
        found["GPT-2, 48 layers"] = Workload(deep, (rounds + 1) // 2, 0.35, 0.4)
    return found


def measure(optimizer: optax.GradientTransformation, params: dict[str, Any]) -> Measurement:
    """Traces and compiles one update afresh."""
    jax.clear_caches()
    state = jax.eval_shape(optimizer.init, params)
    started = time.perf_counter()
    lowered = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params)
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    analysis: Any = compiled.memory_analysis()
    return Measurement(seconds, len(lowered.as_text()), analysis.temp_size_in_bytes)


def rows_of(title: str, workload: Workload) -> list[dict[str, Any]]:
    """One row per optimizer."""
    found: dict[str, list[Measurement]] = {name: [] for name in OPTIMIZERS}
    for _ in range(workload.rounds):
        for name, optimizer in OPTIMIZERS.items():
            found[name].append(measure(optimizer, workload.params))
    baseline = found[BASELINE]
    rows = []
    for name, measurements in found.items():
        pairs = zip(measurements, baseline, strict=True)
        ratio = statistics.median(own.seconds / theirs.seconds for own, theirs in pairs)
        last, judged = measurements[-1], name == "orthax.muon"
        rows.append(
            {
                "workload": title,
                "update": name,
                "trace + compile (s)": round(statistics.median(m.seconds for m in measurements), 2),
                "of optax's": round(ratio, 3),
                "target": workload.time_target if judged else "",
                "StableHLO (KB)": round(last.program / 1e3),
                "temporary (MB)": round(last.memory / 1e6, 1),
                "of optax's memory": round(last.memory / baseline[-1].memory, 3),
                "its target": (workload.memory_target or "") if judged else "",
            }
        )
    return rows


def main(rounds: int = 3, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      rounds: Measurements of each, interleaved; the table shows medians. Half of them at 48 layers.
      smoke: Few small leaves and one round, and no record.
    """
    rows = []
    for title, workload in workloads(1 if smoke else rounds, smoke).items():
        rows += rows_of(title, workload)
    print(record.table(rows))
    if not smoke:
        record.write("compile_time", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
