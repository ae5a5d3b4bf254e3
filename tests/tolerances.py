"""Every tolerance of the tests, by name; those of arithmetic follow from its dtype and size."""

import contextlib

import jax
import jax.numpy as jnp

# Published codes run in float32 on another machine (golden/README.md), as a part of the step.
GOLDEN_STEP = 5e-4
# Published tables are printed with 15 digits, after a Remez iteration that stops at 1e-15.
PUBLISHED_TABLE = 1e-12
# Anchors of papers and surveys are printed with three or four digits.
PRINTED = 1e-3


def eps(dtype):
    """Spacing of the numbers of `dtype` at one."""
    return float(jnp.finfo(dtype).eps)


def rounding(dtype, size=1, gain=1.0):
    """Error of an entry of a `size` x `size` matrix with singular values of order one.

    Its entries are of order size**-0.5, and so is the error of a dot product of its rows, as
    rounding errors add up like a random walk. `gain` is what the function does to an error
    in its argument (`oracles.gain`). Eight: a few roundings a step, and the worst of all entries.
    """
    return 8 * eps(dtype) * gain / size**0.5


@contextlib.contextmanager
def double_precision():
    """Lets arrays be float64 (`jax.enable_x64` is a context in new versions of JAX only)."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
