"""How long does the jitted update of a model with many small matrices take to compile?

    python benchmarks/compile_time.py

192 leaves of (64, 64), and GPT-2's matrices at 12 layers, for optax.contrib.muon and orthax, in one
process, in turn. Prints a table and writes benchmarks/results/compile_time.json.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax
import record
import tyro

import orthax

OPTIMIZERS = {
    "optax.contrib.muon": optax.contrib.muon(1e-3),
    "orthax.muon": orthax.muon(1e-3),
    "orthax.muon, stack=False": orthax.muon(1e-3, orthogonalizer=orthax.orthogonalize(stack=False)),
    "optax.adamw": optax.adamw(1e-3),
}


def matrices(shapes: dict[str, tuple[int, int]], layers: int) -> dict[str, dict]:
    """Abstract params: the given kernels in every layer."""
    return {
        f"layer_{i}": {
            name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
            for name, shape in shapes.items()
        }
        for i in range(layers)
    }


def measure(optimizer: optax.GradientTransformation, params: dict) -> tuple[float, float]:
    """Returns seconds to trace and compile the update, and the size of its StableHLO in KB."""
    jax.clear_caches()
    state = jax.eval_shape(optimizer.init, params)
    started = time.perf_counter()
    lowered = jax.jit(optimizer.update).lower(params, state, params)
    lowered.compile()
    return time.perf_counter() - started, len(lowered.as_text()) / 1e3


def main(rounds: int = 5, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      rounds: Measurements of each, interleaved; the table shows medians.
      smoke: Few leaves and one round, and no record.
    """
    attention = {name: (768, 768) for name in ("query", "key", "value", "out")}
    workloads = {
        "192 of (64, 64)": matrices({"dense": (64, 64)}, 8 if smoke else 192),
        "GPT-2, 12 layers": matrices(
            {**attention, "up": (768, 3072), "down": (3072, 768)}, 1 if smoke else 12
        ),
    }
    rows = []
    for workload, params in workloads.items():
        times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        sizes = {}
        for _ in range(1 if smoke else rounds):
            for name, optimizer in OPTIMIZERS.items():
                seconds, sizes[name] = measure(optimizer, params)
                times[name].append(seconds)
        baseline = times["optax.contrib.muon"]
        for name in OPTIMIZERS:
            ratios = [ours / theirs for ours, theirs in zip(times[name], baseline, strict=True)]
            rows.append(
                {
                    "workload": workload,
                    "update": name,
                    "trace + compile (s)": round(statistics.median(times[name]), 2),
                    "of optax's": round(statistics.median(ratios), 3),
                    "StableHLO (KB)": round(sizes[name]),
                }
            )
    print(record.table(rows))
    if not smoke:
        record.write("compile_time", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
