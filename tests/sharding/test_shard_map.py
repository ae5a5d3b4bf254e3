"""Inside `jax.shard_map`, on matrices that differ per device, results are those outside of it.

With the default `check_vma` JAX refuses a loop whose carry starts from a constant and ends as
something that varies over devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from contract_cases import CASES, normal_tree, shapes_of
from function_cases import FUNCTIONS
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import orthax
from orthax import linalg
from orthax.linalg import half_products

DEVICES = 2
TOLERANCE = 1e-4  # of the largest entry: another program, whose rounding orthogonalisers amplify


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8, "run `pytest tests/sharding` by itself"
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,), devices=devices)


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        x, y = oracles.float64(x), oracles.float64(y)
        name = jax.tree_util.keystr(path)
        assert x.shape == y.shape, name
        assert np.abs(x - y).max(initial=0) <= TOLERANCE * np.abs(y).max(initial=1e-30), name


def on_each_device(function, mesh, *specs, out=P("d")):
    """The function of slices of arrays; where the spec is P("d"), the first axis is of devices."""
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)


# --- functions


STACKS = np.random.default_rng(0).standard_normal((DEVICES, 2, 5, 4)).astype(np.float32)


# In JAX 0.7 the transpose of an FFT forgets over which axes its result varies.
WITHOUT_GRADIENT = {"nearest_orthogonal", "top_columns", "dct by fft", "idct by fft"}


@functools.cache
def functions_and_gradients(mesh):
    """By name, values inside and outside; one program each for all."""

    def values(stack):
        return {name: function(stack) for name, function in FUNCTIONS.items()}

    def inside(stack):
        return jax.tree.map(lambda y: y[None], values(stack[0]))

    outside = jax.jit(values)
    expected = [outside(stack) for stack in STACKS]
    return jax.jit(on_each_device(inside, mesh, P("d")))(STACKS), expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loop_that_starts_from_constants_can_be_traced(name, mesh):
    function = FUNCTIONS[name]

    def inside(stack):
        return jax.tree.map(lambda y: y[None], function(stack[0]))

    def gradient(stack):
        values = jax.tree.leaves(function(stack[0]))
        return sum(jnp.sum(jnp.abs(y)) for y in values if jnp.issubdtype(y.dtype, jnp.inexact))

    jax.eval_shape(on_each_device(inside, mesh, P("d")), STACKS)
    if name not in WITHOUT_GRADIENT:
        jax.eval_shape(on_each_device(jax.grad(gradient), mesh, P("d")), STACKS)


def test_functions_have_the_values_that_they_have_outside(mesh):
    actual, expected = functions_and_gradients(mesh)
    for i, values in enumerate(expected):
        assert_close(jax.tree.map(lambda y, i=i: y[i], actual), values)


# --- transformations


def spec_of(keys):
    """`Dense_1` is the same on all devices, all other leaves differ: experts."""
    return P() if "Dense_1" in jax.tree_util.keystr(keys) else P("d")


def trees_of(case, seeds):
    """One tree a device, and the trees with the devices' arrays stacked, where they differ."""
    alone = [normal_tree(shapes_of(case), seed) for seed in seeds]

    def together(keys, *xs):
        return xs[0] if spec_of(keys) == P() else jnp.stack(xs)

    stacked = jax.tree_util.tree_map_with_path(together, *alone)
    alone = [
        jax.tree_util.tree_map_with_path(
            lambda k, x, i=i: x if spec_of(k) == P() else x[i], stacked
        )
        for i in range(len(alone))
    ]
    return alone, stacked, jax.tree_util.tree_map_with_path(lambda keys, _: spec_of(keys), stacked)


def two_updates(transformation, params, g):
    """The second of two updates, in a loop whose carry is the state."""

    def step(state, _):
        updates, state = transformation.update(g, state, params)
        return state, updates

    _, updates = jax.lax.scan(step, transformation.init(params), length=2)
    return jax.tree.map(lambda u: u[1], updates)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_updates_are_those_outside_and_leaves_that_are_equal_stay_so(case, mesh):
    transformation = case.build()
    alone, params, specs = trees_of(case, (0, 1))
    gradients, g, _ = trees_of(case, (2, 3))

    def inside(params, g):
        def one(x, spec):
            return x if spec == P() else x[0]

        params, g = (jax.tree.map(one, tree, specs) for tree in (params, g))
        updates = two_updates(transformation, params, g)
        return jax.tree.map(lambda u, spec: u if spec == P() else u[None], updates, specs)

    actual = jax.jit(on_each_device(inside, mesh, specs, specs, out=specs))(params, g)
    outside = jax.jit(functools.partial(two_updates, transformation))
    for i, given in enumerate(zip(alone, gradients, strict=True)):
        mine = jax.tree.map(lambda u, spec, i=i: u if spec == P() else u[i], actual, specs)
        assert_close(mine, outside(*given))


def test_the_kernel_says_over_which_axes_its_product_varies(mesh):
    def product(x):
        return half_products.by_kernel(x, x)

    found = jax.eval_shape(on_each_device(product, mesh, P("d")), STACKS[:, 0])
    assert found.shape == (DEVICES, 5, 5)


def test_a_long_stack_is_cut_to_leaves_that_vary_and_leaves_that_do_not(mesh):
    leaves = {str(i): np.ones((4, 4), np.float32) for i in range(18)}
    specs = {name: P("d") if int(name) % 2 else P() for name in leaves}

    def inside(g):
        updates, _ = orthax.orthogonalize().update(g, optax.EmptyState())
        return updates

    tall = {name: np.concatenate([x, 2 * x]) if specs[name] else x for name, x in leaves.items()}
    found = jax.eval_shape(on_each_device(inside, mesh, specs, out=specs), tall)
    assert {name: x.shape for name, x in found.items()} == {n: x.shape for n, x in tall.items()}


def test_what_differs_may_be_one_argument_only(mesh):
    """Params that are equal with gradients that differ, the other way round, and numbers."""
    injected = optax.inject_hyperparams(orthax.normuon)(0.1, weight_decay=0.1)
    kept = orthax.keep_orthogonal()

    def updates(equal, different):
        first, _ = kept.update(equal, optax.EmptyState(), different)
        second, _ = kept.update(different, optax.EmptyState(), equal)
        state = injected.init(equal)
        rates = {name: 0.1 * abs(different["0"][0, 0]) * x for name, x in state.hyperparams.items()}
        third, _ = injected.update(equal, state._replace(hyperparams=rates), equal)
        return first, second, third

    def inside(equal, different):
        found = updates(equal, jax.tree.map(lambda x: x[0], different))
        return jax.tree.map(lambda u: u[None], found)

    equal = {"0": STACKS[0, 0], "1": STACKS[0, 1]}
    different = {"0": 1 + STACKS[:, 0], "1": 1 + STACKS[:, 1]}
    found = jax.jit(on_each_device(inside, mesh, P(), P("d")))(equal, different)
    outside = jax.jit(updates)
    for i in range(DEVICES):
        expected = outside(equal, jax.tree.map(lambda x, i=i: x[i], different))
        assert_close(jax.tree.map(lambda u, i=i: u[i], found), expected)


def test_without_the_check_it_is_the_same(mesh):
    transformation, g = orthax.muon(0.1), {"kernel": STACKS[:, 0]}

    def inside(g):
        g = jax.tree.map(lambda x: x[0], g)
        updates, _ = transformation.update(g, transformation.init(g))
        return jax.tree.map(lambda u: u[None], updates)

    run = jax.shard_map(inside, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    assert_close(jax.jit(run)(g), jax.jit(on_each_device(inside, mesh, P("d")))(g))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_other_mesh_axes_may_be_left_to_the_compiler(kind):
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    # By name: the default chooses another method where the compiler lays matrices out.
    transformation = orthax.normuon(0.1, orthogonalizer=orthax.orthogonalize(linalg.newton_schulz))

    def inside(g):
        return two_updates(transformation, g, g)

    g = {"kernel": np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)}
    run = jax.shard_map(inside, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(g, jax.NamedSharding(mesh, P("d", "m"))))
    found = jax.device_get(found)
    for i in range(2):
        half = {"kernel": g["kernel"][4 * i : 4 * i + 4]}
        assert_close({"kernel": found["kernel"][4 * i : 4 * i + 4]}, jax.jit(inside)(half))
