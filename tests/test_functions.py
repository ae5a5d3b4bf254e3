"""What JAX users may expect of any public function of matrices, for each in `function_cases`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from function_cases import FUNCTIONS, OTHERS
from helpers import normal
from test_contract import precision, program

import orthax
import orthax.nn
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
    """Something with an array in it."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


@pytest.mark.parametrize("box", [Variable, nnx.Param])
@every_function
def test_a_variable_is_taken_for_its_array(name, box):
    function = FUNCTIONS[name]
    program(function, X)  # in a text, parts that JAX has traced before go by a name
    plain = program(lambda x: function(x), X)  # a new function: that one is not traced again
    assert program(lambda x: function(box(x)), X) == plain


@pytest.mark.parametrize("box", [Variable, nnx.Param])
def test_all_arrays_of_a_call_may_be_variables(box):
    for function in (
        diagnostics.update_to_weight_ratio,
        linalg.householder_projector,
        functools.partial(linalg.spectral_norm, X),
    ):
        arguments = (X, X) if not isinstance(function, functools.partial) else (X[:, 0],)
        boxed = lambda *xs, f=function: f(*map(box, xs))  # noqa: E731
        plain = lambda *xs, f=function: f(*xs)  # noqa: E731
        program(function, *arguments)
        assert program(boxed, *arguments) == program(plain, *arguments)
    radius = box(jnp.float32(0.5))
    expected = penalties.lambda_orthogonality(X, 0.5, 2.0)
    assert penalties.lambda_orthogonality(X, radius, box(jnp.float32(2))) == expected
    memory = diagnostics.warm_spectral_norm()
    norm, _ = memory.apply(box(X), box(memory.init(box(X))))
    assert norm.shape == (2,)
    layer = orthax.nn.HouseholderLinear.from_kernel(box(X[0]), box(X[0, 0]))
    assert layer.kernel.shape == (5, 4)


@pytest.mark.parametrize("call", ["dct", "idct", "trion", "low_rank"])
def test_a_cosine_matrix_that_is_too_long_is_refused_in_the_name_of_the_call(call):
    x = jax.ShapeDtypeStruct((2**15 + 1, 2**15 + 2), jnp.float32)
    run = {
        "dct": lambda x: linalg.dct(x, method="matrix"),
        "idct": lambda x: linalg.idct(x, method="matrix"),
        "trion": lambda x: orthax.trion(0.1, 8).init({"w": x}),
        "low_rank": lambda x: orthax.low_rank(optax.trace(0.9), 8).init({"w": x}),
    }[call]
    name = f"{call}: " if "dct" in call else f"{call}: 'w'"
    with pytest.raises(ValueError, match=f"^{name}.*at most 32768"):
        jax.eval_shape(run, x)
