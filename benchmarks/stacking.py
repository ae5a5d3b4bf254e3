"""Batched or one after the other: how should a stack of matrices be orthogonalised?

    python benchmarks/stacking.py

Times `newton_schulz` on lists of equal matrices: stacked and batched, stacked and mapped over, by
`lax.map` or in place, and one by one, in turn. The rule in orthax/linalg/_stacking.py follows from
it. Prints a table and writes benchmarks/results/stacking.json.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import record
import tyro

from orthax.base.stacks import map_in_place
from orthax.linalg import newton_schulz

STACKS = (
    (64, 64, 64),
    (64, 64, 256),
    (32, 128, 128),
    (24, 128, 512),
    (16, 256, 256),
    (12, 256, 1024),
    (8, 384, 384),
    (6, 384, 1536),
    (4, 768, 768),
    (2, 768, 3072),
)

WAYS = {
    "batched": jax.jit(lambda xs: list(newton_schulz(jnp.stack(xs)))),
    "lax.map": jax.jit(lambda xs: list(jax.lax.map(newton_schulz, jnp.stack(xs)))),
    "in place": jax.jit(lambda xs: list(map_in_place(newton_schulz, jnp.stack(xs)))),
    "unrolled": jax.jit(lambda xs: [newton_schulz(x) for x in xs]),
}


def main(rounds: int = 9, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      rounds: Timings of each, interleaved; the table shows medians.
      smoke: Small stacks and one round, and no record.
    """
    rows = []
    generator = np.random.default_rng(0)
    for shape in STACKS[:2] if smoke else STACKS:
        stack = list(jnp.asarray(generator.standard_normal(shape), "float32"))
        for run in WAYS.values():
            jax.block_until_ready(run(stack))
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(1 if smoke else rounds):
            for name, run in WAYS.items():
                started = time.perf_counter()
                jax.block_until_ready(run(stack))
                times[name].append(time.perf_counter() - started)
        speeds = {
            f"{name} speed": round(
                statistics.median(
                    b / t for b, t in zip(times["batched"], times[name], strict=True)
                ),
                2,
            )
            for name in list(WAYS)[1:]
        }
        batched = round(1e3 * statistics.median(times["batched"]), 1)
        rows.append({"stack": shape, "batched (ms)": batched, **speeds})
    print(record.table(rows))
    print("Speeds are relative to batched: larger is faster.")
    if not smoke:
        record.write("stacking", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
