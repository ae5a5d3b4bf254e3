"""Hermitian products from half of their blocks: the values of the whole, for fewer products.

The kernel runs interpreted here; that it can be compiled for a GPU is tested by lowering it.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import normal

from orthax.linalg import elementary, gram_newton_schulz, nearest_orthogonal, newton_schulz
from orthax.linalg import half_products as half
from orthax.linalg.elementary import gram, symmetric_product

SMALL = half.Tiles(side=16, depth=8)
kernel = functools.partial(half.by_kernel, tiles=SMALL, interpret=True)
METHODS = {
    "one level": half.by_blocks,
    "two levels": functools.partial(half.by_blocks, levels=2),
    "kernel": kernel,
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def conjugate(x):
    return oracles.mT(x).conj()


def error(actual, expected):
    return np.linalg.norm(oracles.float64(actual) - expected) / np.linalg.norm(expected)


@by_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("shape", [(1, 5), (16, 8), (37, 21), (3, 33, 4)], ids=str)
def test_a_gram_matrix_by_half_is_that_of_numpy(method, dtype, shape):
    x = jnp.asarray(normal(shape, np.complex64 if dtype == jnp.complex64 else np.float32), dtype)
    actual = jax.jit(method)(x, x)
    assert actual.dtype == dtype
    wide = oracles.float64(x)
    assert error(actual, wide @ conjugate(wide)) < tolerances.eps(dtype)


@by_method
def test_a_product_of_polynomials_by_half_is_that_of_numpy(method):
    r = normal((37, 5)) @ normal((37, 5)).T
    p = np.float32(2) * np.eye(37, dtype=np.float32) - r
    expected = oracles.float64(p) @ oracles.float64(r)
    assert error(jax.jit(method)(p, r), expected) < 8 * tolerances.eps(np.float32)


@by_method
def test_blocks_off_the_diagonal_mirror_each_other_exactly(method):
    # Of a product that is not Hermitian: half of it is never computed.
    x, y = normal((32, 8)), normal((32, 8), seed=1)
    product = np.asarray(method(x, y))
    np.testing.assert_array_equal(product[16:, :16], product[:16, 16:].T)
    assert error(product[16:, :16], oracles.float64(x[16:]) @ y[:16].T) < 1e-6


@pytest.mark.parametrize(("levels", "part"), [(1, 3 / 4), (2, 5 / 8)])
def test_blocks_leave_out_products(levels, part):
    x = jnp.ones((64, 24))

    def multiplications(levels):
        program = jax.make_jaxpr(functools.partial(half.by_blocks, levels=levels))(x, x)
        products = [e for e in oracles.equations(program) if e.primitive.name == "dot_general"]
        return sum(e.outvars[0].aval.size * 24 for e in products)

    assert multiplications(levels) == part * multiplications(0)


def test_the_kernel_has_a_program_per_tile_on_or_below_the_diagonal_of_each_matrix():
    x = jnp.ones((3, 4 * 16 - 5, 8))
    program = jax.make_jaxpr(kernel)(x, x)
    (call,) = [e for e in oracles.equations(program) if e.primitive.name == "pallas_call"]
    assert call.params["grid_mapping"].grid == (4 * 5 // 2, 3)


@by_method
def test_double_precision_is_kept(method):
    x = normal((21, 5), np.float64)
    with tolerances.double_precision():
        actual = method(jnp.asarray(x), jnp.asarray(x))
        assert actual.dtype == np.float64
        assert error(actual, x @ x.T) < tolerances.eps(np.float64)


@by_method
def test_the_derivative_by_half_goes_through_all_blocks(method):
    x, weight = normal((33, 5)), normal((33, 33), seed=1)
    gradient = jax.jit(jax.grad(lambda x: (weight * method(x, x)).sum()))(x)
    expected = oracles.float64(weight + weight.T) @ oracles.float64(x)
    assert error(gradient, expected) < tolerances.rounding(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_the_kernel_lowers_for_cuda(dtype):
    x = jax.ShapeDtypeStruct((2, 256, 100), dtype)
    fields = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
    known = inspect.signature(jax.sharding.AbstractDevice).parameters
    device = jax.sharding.AbstractDevice(**{k: v for k, v in fields.items() if k in known})
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(half.by_kernel).trace(x, x).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


# --- the rule


def counted(monkeypatch):
    """A rule that counts its calls."""
    calls = []

    def method(x, y, precision=None):
        calls.append(x.shape)
        return jnp.matmul(x, y.mT.conj(), precision=precision)

    monkeypatch.setitem(elementary.HALVED, "cpu", elementary.Halving(24, method))
    return calls


def test_products_go_by_half_from_the_rows_of_the_rule(monkeypatch):
    calls = counted(monkeypatch)
    for rows in (23, 24, 100):
        gram(normal((rows, 4)))
        symmetric_product(np.eye(rows, dtype=np.float32), np.eye(rows, dtype=np.float32))
    assert calls == [(24, 4), (24, 24), (100, 4), (100, 100)]


def test_products_on_a_mesh_are_whole(monkeypatch):
    calls = counted(monkeypatch)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(normal((32, 4)), jax.NamedSharding(mesh, jax.P()))
    gram(x)
    assert not calls


ITERATIONS = {
    "newton_schulz": newton_schulz,
    "gram_newton_schulz": gram_newton_schulz,
    "nearest_orthogonal": nearest_orthogonal,
}


@pytest.mark.parametrize("iteration", ITERATIONS.values(), ids=ITERATIONS)
@by_method
def test_iterations_by_half_are_those_by_whole_products(method, iteration, monkeypatch):
    x = normal((2, 33, 70))
    whole = iteration(x)
    monkeypatch.setitem(elementary.HALVED, "cpu", elementary.Halving(24, method))
    by_half = jax.jit(lambda x: iteration(x))(
        x
    )  # a new function: not the program of the line above
    chex.assert_trees_all_close(by_half, whole, atol=1e-4)
