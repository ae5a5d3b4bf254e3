"""Which leaf is a matrix is decided once, over the whole tree, and handed to the chains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import OPTIMIZERS, normal_tree, says
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.matrices import partition

# The bias alone tells that the last two axes of the kernel are its outputs.
SHAPES = {
    "DenseGeneral_0": {"kernel": (6, 2, 4), "bias": (2, 4)},
    "Dense_0": {"kernel": (6, 8), "bias": (8,)},
}


def trees():
    return normal_tree(SHAPES), normal_tree(SHAPES, seed=1)


def kernels(params):
    """A mask that looks at the model's own keys, as many users write it."""
    return {name: {leaf: leaf == "kernel" for leaf in module} for name, module in params.items()}


def only_dense(params):
    return {name: name == "Dense_0" for name in params}  # a prefix of the tree


def first_update(tx, params, gradients):
    """As one program."""
    update = jax.jit(lambda params, gradients: tx.update(gradients, tx.init(params), params)[0])
    return update(params, gradients)


def assert_equal(actual, expected, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
def test_leaves_are_decided_once_per_update(optimizer, monkeypatch):
    calls, resolve = [], partition.resolve

    def counted(call, *arguments, **options):
        calls.append(call)
        return resolve(call, *arguments, **options)

    monkeypatch.setattr(partition, "resolve", counted)
    (params, gradients), tx = trees(), optimizer(0.1, weight_decay=0.1)
    state = tx.init(params)
    assert calls == [optimizer.__name__]
    jax.eval_shape(tx.update, gradients, state, params)
    assert calls == [optimizer.__name__] * 2


@every_optimizer
def test_a_callable_mask_sees_the_whole_tree_as_in_adamw(optimizer):
    params, gradients = trees()
    plain = first_update(optimizer(0.1), params, gradients)
    for mask in (kernels, only_dense):
        decayed = first_update(optimizer(0.1, weight_decay=0.5, mask=mask), params, gradients)
        # Where optax's own AdamW decays, and nowhere else.
        theirs = optax.add_decayed_weights(0.5, mask)
        decay, _ = theirs.update(jax.tree.map(np.zeros_like, params), theirs.init(params), params)
        difference = jax.tree.map(np.subtract, decayed, plain)
        assert_equal(difference, jax.tree.map(lambda x: -0.1 * x, decay))


@every_optimizer
def test_a_mask_may_ask_every_leaf_for_its_axes(optimizer):
    params = normal_tree({"w": (6, 8), "b": (8,)})
    mask = lambda p: {name: leaf.ndim > 1 for name, leaf in p.items()}  # noqa: E731
    zeros = jax.tree.map(np.zeros_like, params)
    updates = first_update(optimizer(0.1, weight_decay=0.5, mask=mask), params, zeros)
    assert_equal(updates, {"w": -0.05 * params["w"], "b": zeros["b"]})


def test_callable_dimension_numbers_see_the_whole_tree():
    seen = []

    def dimension_numbers(params):
        seen.append(jax.tree.structure(params))
        kernel = MuonDimensionNumbers(0, (1, 2))
        return {"DenseGeneral_0": {"kernel": kernel, "bias": None}, "Dense_0": None}

    (params, gradients), tx = trees(), orthax.muon(0.1, dimension_numbers=dimension_numbers)
    first_update(tx, params, gradients)
    assert seen == [jax.tree.structure(params)] * 2


def test_a_transformation_inside_acts_as_in_a_partition_of_optax_with_the_same_split():
    # as_matrices on its own sees only its part: without the bias nothing tells the axes.
    params, gradients = trees()
    inner = orthax.as_matrices(orthax.orthogonalize())
    labels = jax.tree.map_with_path(lambda path, _: path[-1].key, params)
    theirs = optax.partition({"kernel": inner, "bias": optax.identity()}, labels)
    ours = orthax.partition_matrices(inner, optax.identity())
    for tx in (theirs, ours):
        with pytest.raises(ValueError, match=r"as_matrices: 'DenseGeneral_0/kernel'"):
            tx.init(params)
    with_views = orthax.partition_matrices(
        lambda leaves: leaves(orthax.orthogonalize()), optax.identity()
    )
    q = first_update(with_views, params, gradients)["DenseGeneral_0"]["kernel"].reshape(6, 8)
    assert abs(np.linalg.svd(q, compute_uv=False) - 1).max() < 0.3


def test_a_chain_may_be_masked_further_inside():
    params, gradients = trees()
    mask = {"DenseGeneral_0": True, "Dense_0": False}
    tx = orthax.partition_matrices(
        lambda leaves: optax.masked(leaves(optax.scale(0.0)), mask), optax.scale(2.0)
    )
    updates = first_update(tx, params, gradients)
    assert not updates["DenseGeneral_0"]["kernel"].any()
    assert_equal(updates["Dense_0"]["kernel"], gradients["Dense_0"]["kernel"])
    assert_equal(updates["Dense_0"]["bias"], 2 * gradients["Dense_0"]["bias"])


@pytest.mark.parametrize("rest", [optax.scale(2.0), lambda leaves: optax.scale(2.0)])
def test_the_rest_is_a_transformation_or_a_function_to_one(rest):
    params, gradients = trees()
    updates = first_update(orthax.partition_matrices(optax.identity(), rest), params, gradients)
    assert_equal(updates["Dense_0"]["bias"], 2 * gradients["Dense_0"]["bias"])
    assert_equal(updates["Dense_0"]["kernel"], gradients["Dense_0"]["kernel"])


@every_optimizer
def test_the_weight_decay_may_be_a_transformation(optimizer):
    def half_the_params(updates, params):
        return jax.tree.map(lambda u, p: u + 0.5 * p, updates, params)

    params, gradients = trees()
    given = optimizer(0.1, weight_decay=optax.stateless(half_the_params), mask=kernels)
    number = optimizer(0.1, weight_decay=0.5, mask=kernels)
    assert_equal(first_update(given, params, gradients), first_update(number, params, gradients))


@every_optimizer
@pytest.mark.parametrize("mask", [None, True], ids=["all", "masked"])
def test_decay_without_params_names_the_optimizer_and_the_argument(optimizer, mask):
    params, gradients = trees()
    tx = optimizer(0.1, weight_decay=0.25, mask=mask)
    said = says(optimizer.__name__, "weight_decay=0.25", "params")
    with pytest.raises(ValueError, match=said):
        tx.update(gradients, tx.init(params))


def test_float16_is_accumulated_in_float32_in_built_chains():
    tx = orthax.partition_matrices(lambda leaves: optax.trace(0.99), optax.trace(0.99))
    params = {"w": jnp.ones((2, 2), jnp.float16)}
    gradient, state = jax.tree.map(lambda x: 1000 * x, params), tx.init(params)
    for _ in range(100):  # the sum passes 65504, the largest float16
        updates, state = tx.update(gradient, state)
    (trace,) = jax.tree.leaves(state.inner_states["matrices"])
    assert trace.dtype == jnp.float32 and trace.max() > 62000
    assert updates["w"].dtype == jnp.float16


@pytest.mark.parametrize("retain", [0.0, 0.9])
def test_the_buffer_of_low_rank_keeps_the_dtype_of_the_params(retain):
    params = {"w": jnp.ones((8, 4))}
    tx = orthax.low_rank(optax.identity(), 2, retain=retain)
    state, g = tx.init(params), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, new = jax.eval_shape(tx.update, g, state, params)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, new)]
    assert types[0] == types[1]


def test_the_buffer_of_low_rank_is_not_rounded_to_the_dtype_of_the_gradients():
    params, g = {"w": jnp.ones((4, 4))}, {"w": jnp.full((4, 4), 0.3, jnp.bfloat16)}
    tx = orthax.low_rank(optax.identity(), 4, retain=0.99)
    state = tx.init(params)
    for _ in range(200):
        _, state = tx.update(g, state, params)
    # retain (buffer + g), 200 times from zero.
    expected = 0.99 * (1 - 0.99**200) / 0.01 * float(g["w"][0, 0])
    # Only the coordinates that inner sees are rounded, a hundredth of which decays.
    np.testing.assert_allclose(state.residuals["w"], expected, rtol=1e-3)


# --- models that are trees and can be called, as Equinox modules are


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallableModel:
    up: object
    down: object

    def __call__(self, x):
        return x @ self.up @ self.down


def callable_trees():
    shapes = CallableModel(up=(6, 8), down=(8, 3))
    return normal_tree(shapes), normal_tree(shapes, seed=1)


def as_dict(model):
    return {"up": model.up, "down": model.down}


@every_optimizer
def test_a_model_that_can_be_called_is_a_tree_of_params(optimizer):
    params, gradients = callable_trees()
    tx = optimizer(0.1, weight_decay=0.1, mask=CallableModel(up=True, down=False))
    plain = optimizer(0.1, weight_decay=0.1, mask={"up": True, "down": False})
    update = first_update(tx, params, gradients)
    assert isinstance(update, CallableModel)
    expected = first_update(plain, as_dict(params), as_dict(gradients))
    assert_equal([update.up, update.down], [expected["up"], expected["down"]])


def test_dimension_numbers_in_the_form_of_such_a_model_are_a_tree():
    params, _ = callable_trees()
    dims = CallableModel(up=MuonDimensionNumbers(1, 0), down=None)
    rows = orthax.explain(params, dims).rows
    assert [(row.path, row.view) for row in rows] == [("up", "(8, 6)"), ("down", "")]
    nothing = CallableModel(up=None, down=None)
    assert {row.destination for row in orthax.explain(params, nothing).rows} == {"fallback"}
    chosen = orthax.explain(params, lambda tree: dims).rows
    assert [row.view for row in chosen] == ["(8, 6)", ""]
