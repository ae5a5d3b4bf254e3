"""The program of an update stays small and compiles fast when a model has many matrices."""

import json
import subprocess
import sys

import compilation

# In a process of its own, which compiles as users do.
MEASURE = """
import json, time
import jax, jax.numpy as jnp, optax, orthax

params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for i in range(192)}

def trace_and_compile(optimizer):
    jax.clear_caches()
    state = jax.eval_shape(optimizer.init, params)
    started = time.perf_counter()
    lowered = jax.jit(optimizer.update).lower(params, state, params)
    lowered.compile()
    return time.perf_counter() - started, len(lowered.as_text())

theirs = trace_and_compile(optax.contrib.muon(1e-3))
print(json.dumps([theirs, trace_and_compile(orthax.muon(1e-3))]))
"""


def test_192_small_matrices_compile_in_three_tenths_of_optax_muons_time_and_355_kilobytes():
    environment = compilation.users_environment()
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (theirs, _), (ours, size) = json.loads(run.stdout)
    assert size <= 355_000
    assert ours <= 0.3 * theirs
