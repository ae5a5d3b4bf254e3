"""What JAX users may expect of any public function of matrices, for each in `function_cases`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from function_cases import FUNCTIONS, OTHERS
from helpers import normal
from test_contract import precision

from orthax import conv_penalties, diagnostics, linalg, penalties

# Steps that depend on values have no reverse-mode derivative, and indices have none.
WITHOUT_GRADIENT = {"nearest_orthogonal", "top_columns"}
# Decompositions of matrices with equal singular values have no derivative at all.
DECOMPOSED = {"polar_svd", "householder_factors", "householder_vectors"}
REAL = [name for name in FUNCTIONS if name.startswith("householder")]
X = normal((2, 5, 4))

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def total(name, x):
    """A function of all floating entries of what it returns."""
    values = jax.tree.leaves(FUNCTIONS[name](x))
    floating = [y for y in values if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.sin(jnp.real(y).astype(jnp.float32) + 1)) for y in floating)


def test_every_public_function_is_in_the_table():
    modules = (linalg, penalties, conv_penalties, diagnostics)
    names = {name for module in modules for name in module.__all__}
    assert names == {name.partition(" ")[0] for name in FUNCTIONS} | OTHERS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@every_function
def test_dtypes_are_not_mixed(name, dtype):
    if dtype == "complex64" and name in REAL:
        return
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(FUNCTIONS[name], x)
        if name not in WITHOUT_GRADIENT:
            jax.eval_shape(jax.grad(functools.partial(total, name)), x)


@every_function
def test_float32_stays_float32_where_float64_is_enabled(name):
    def types(x):
        return jax.tree.map(lambda y: y.dtype, jax.eval_shape(FUNCTIONS[name], x))

    x = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    expected = types(x)
    with precision("float64"):
        assert types(x) == expected
        assert not re.search(r"(f64|c128)\[\d", str(jax.make_jaxpr(FUNCTIONS[name])(x)))


@every_function
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        jax.eval_shape(FUNCTIONS[name], jax.ShapeDtypeStruct(X.shape, jnp.float32))


def degenerate():
    """Stacks where norms, roots and logarithms meet zero."""
    column, row = X.copy(), X.copy()
    column[..., 1] = row[..., 1, :] = 0
    return np.stack(
        [column, row, 0 * X, np.ones_like(X), np.broadcast_to(np.eye(5, 4), X.shape)]
    ).astype(np.float32)


def test_gradients_are_finite_where_norms_are_zero_and_lengths_equal():
    names = [name for name in FUNCTIONS if name not in WITHOUT_GRADIENT | DECOMPOSED]
    slopes = {name: jax.grad(functools.partial(total, name)) for name in names}
    gradients = jax.jit(lambda x: {name: slope(x) for name, slope in slopes.items()})
    for i, x in enumerate(degenerate()):
        for name, gradient in gradients(x).items():
            assert np.isfinite(gradient).all(), (name, i)


class Variable:
    """Something with an array in it, as `nnx.Param` is."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value
