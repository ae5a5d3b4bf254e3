"""HouseholderLinear: orthogonal whatever its parameters, nearest to a trained kernel, trainable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx

import orthax
import orthax.nn
from orthax.nn import HouseholderLinear

SHAPES = {"tall": (7, 4, None), "wide": (4, 7, None), "square": (5, 5, None), "rank 2": (7, 4, 2)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def reflections(v):
    """H_1 H_2 ... H_r in float64, one after the other."""
    v = oracles.float64(v)
    q = np.eye(v.shape[0])
    for column in v.T:
        q = q @ (np.eye(v.shape[0]) - 2 * np.outer(column, column) / (column @ column))
    return q


def layer_of(shape, **options):
    ins, outs, rank = shape
    return HouseholderLinear(ins, outs, rank=rank, rngs=nnx.Rngs(0), **options)


def spectrum(kernel):
    return np.linalg.svd(oracles.float64(kernel), compute_uv=False)


@every_shape
def test_singular_values_are_ones_and_zeros(shape):
    ins, outs, rank = shape
    count = rank or min(ins, outs)
    expected = np.arange(min(ins, outs)) < count
    np.testing.assert_allclose(spectrum(layer_of(shape).kernel), expected, atol=1e-6)


@every_shape
def test_the_kernel_is_the_product_of_the_reflections(shape):
    layer, (ins, outs, rank) = layer_of(shape), shape
    if rank:
        left = reflections(layer.input_reflectors[...])[:, :rank]
        expected = left @ reflections(layer.output_reflectors[...])[:, :rank].T
    elif ins >= outs:
        assert layer.output_reflectors is None
        expected = reflections(layer.input_reflectors[...])[:, :outs]
    else:
        assert layer.input_reflectors is None
        expected = reflections(layer.output_reflectors[...])[:, :ins].T
    np.testing.assert_allclose(layer.kernel, expected, atol=2e-6)


@every_shape
def test_it_applies_kernel_and_bias_to_the_last_axis(shape):
    layer = layer_of(shape, bias_init=nnx.initializers.normal(1.0))
    x = np.random.default_rng(0).standard_normal((2, 3, shape[0])).astype(np.float32)
    expected = x @ np.asarray(layer.kernel) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    without = layer_of(shape, use_bias=False)
    assert without.bias is None
    np.testing.assert_allclose(without(x), x @ np.asarray(without.kernel), atol=1e-5)


@every_shape
@pytest.mark.parametrize("optimizer", [optax.adam(0.05), orthax.muon(0.05)], ids=["adam", "muon"])
def test_training_keeps_it_orthogonal_and_lowers_the_loss(shape, optimizer):
    ins, outs, rank = shape
    rng = np.random.default_rng(1)
    target = oracles.orthogonal(rng, ins, outs)
    if rank:
        u, _, vh = np.linalg.svd(target)
        target = u[:, :rank] @ vh[:rank]
    if ins == outs:  # the determinant of an odd number of reflections
        target[:, 0] *= -np.sign(np.linalg.det(target))
    x = jnp.asarray(rng.standard_normal((64, ins)), jnp.float32)
    y = x @ jnp.asarray(target, jnp.float32)
    layer = layer_of(shape)
    trained = nnx.Optimizer(layer, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(layer, trained):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(layer)
        trained.update(layer, grads)
        return loss

    losses = [float(step(layer, trained)) for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]
    count = rank or min(ins, outs)
    np.testing.assert_allclose(spectrum(layer.kernel)[:count], 1, atol=1e-6)


@every_shape
def test_the_layer_of_a_trained_kernel_is_the_nearest(shape):
    ins, outs, rank = shape
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((ins, outs))
    u, _, vh = np.linalg.svd(kernel, full_matrices=False)
    k = rank or min(ins, outs)
    bias = jnp.arange(outs, dtype=jnp.float32)
    layer = HouseholderLinear.from_kernel(jnp.asarray(kernel, jnp.float32), bias, rank)
    np.testing.assert_allclose(layer.kernel, u[:, :k] @ vh[:k], atol=2e-6)
    np.testing.assert_array_equal(layer.bias[...], bias)
    assert HouseholderLinear.from_kernel(jnp.asarray(kernel), rank=rank).bias is None


def test_a_layer_of_an_orthogonal_kernel_computes_the_same():
    linear = nnx.Linear(6, 4, kernel_init=nnx.initializers.orthogonal(), rngs=nnx.Rngs(3))
    layer = HouseholderLinear.from_kernel(linear.kernel[...], linear.bias[...])
    x = jax.random.normal(jax.random.key(0), (5, 6))
    np.testing.assert_allclose(layer(x), linear(x), atol=5e-6)


def test_the_dtype_of_the_computation_is_chosen():
    layer = layer_of(SHAPES["tall"], dtype=jnp.bfloat16)
    assert layer(jnp.ones((2, 7))).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32
    half = layer_of(SHAPES["tall"], param_dtype=jnp.bfloat16)
    assert half.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(spectrum(half.kernel), 1, atol=2e-2)


@every_shape
def test_its_directions_go_to_the_fallback_by_name_and_by_type(shape):
    params = nnx.state(layer_of(shape), nnx.Param)
    for rules in (None, orthax.nn.dimension_numbers(layer_of(shape))):
        rows = orthax.explain(params, rules).rows
        assert {row.destination for row in rows} == {"fallback"}


def test_layers_can_be_stacked_with_vmap():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return HouseholderLinear(5, 3, rngs=nnx.Rngs(key))

    @nnx.vmap(in_axes=(0, None))
    def apply(layer, x):
        return layer(x)

    layers = make(jax.random.split(jax.random.key(0), 2))
    outputs = apply(layers, jnp.ones((4, 5)))
    first = reflections(layers.input_reflectors[...][0])[:, :3]
    np.testing.assert_allclose(outputs[0], np.ones((4, 5)) @ first, atol=1e-5)
