"""How the tests compile: their programs are small and run once or twice, so XLA optimises less.

That takes a fifth of the time. A process inherits it by its environment. `make test-as-users` runs
the tests of accuracy as users compile, and so do these: the README, the scripts of `make examples`.

All of them do linear algebra in one thread: threads of OpenBLAS, on which NumPy and JAX's LAPACK
run, wait for each other at full speed, which takes as long again where the cores are busy.
"""

import os

AS_USERS = "ORTHAX_TESTS_AS_USERS_COMPILE"
UNOPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def compile_faster(environment):
    """Change the environment, before NumPy and JAX are imported.

    Only the number of threads if ORTHAX_TESTS_AS_USERS_COMPILE is 1.
    """
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    if environment.get(AS_USERS) != "1":
        flags = environment.get("XLA_FLAGS", "").split()
        environment["XLA_FLAGS"] = " ".join([*flags, *(f for f in FLAGS if f not in flags)])
        environment[UNOPTIMISED] = "1"


def users_environment():
    """A copy of this process's environment in which JAX compiles as for users."""
    environment = {name: value for name, value in os.environ.items() if name != UNOPTIMISED}
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if flag not in FLAGS)
    return {**environment, AS_USERS: "1"}
