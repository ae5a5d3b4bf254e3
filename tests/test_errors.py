"""Bad input is refused in the caller's words: the call, the argument, the value, what is accepted.

Errors about axes and trees of dimension numbers are in test_matrices.py.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax
from orthax.linalg import gram_newton_schulz, newton_schulz, polar, polar_svd, zolotarev

OPTIMIZERS = {
    "muon": orthax.muon,
    "normuon": orthax.normuon,
    "root": orthax.root,
    "auon": orthax.auon,
    "hybrid_auon": orthax.hybrid_auon,
}
TRANSFORMS = {
    "orthogonalize": orthax.orthogonalize(),
    "clip_by_quantile": orthax.clip_by_quantile(),
    "scale_by_cosh_rms": orthax.scale_by_cosh_rms(),
    "normalize_neurons": orthax.normalize_neurons(),
    "scale_by_width": orthax.scale_by_width(),
    "scale_by_unit_rms": orthax.scale_by_unit_rms(),
    "scale_by_adam_rms": orthax.scale_by_adam_rms(),
    "scale_to_rms": orthax.scale_to_rms(),
}
PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def says(*parts):
    """Pattern of a message that holds all parts, in order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


# --- orthogonalize and its methods


def test_an_unknown_option_of_a_method_is_named_with_the_known_ones():
    known = ("coefficients", "dtype", "precision", "eps")
    with pytest.raises(TypeError, match=says("orthogonalize", "newton_schulz", "'steps'", *known)):
        orthax.orthogonalize(newton_schulz, steps=5)


def test_an_option_for_a_method_without_any_says_so():
    def identity(x):
        return x

    with pytest.raises(TypeError, match=says("orthogonalize", "identity", "'eps'", "none")):
        orthax.orthogonalize(identity, eps=1e-7)


@pytest.mark.parametrize("method", ["newton_schulz", None, 5])
def test_a_method_that_is_no_function_is_refused(method):
    with pytest.raises(TypeError, match=says("orthogonalize", "method", "function", repr(method))):
        orthax.orthogonalize(method)


TABLES = {
    "empty": (),
    "ragged": ((3.4445, -4.775, 2.0315), (1.5, -0.5)),
    "one row": (3.4445, -4.775, 2.0315),
    "pairs": ((1.5, -0.5),),
    "not finite": ((1.0, float("nan"), 0.0),),
    "a name": "muon",
    "none": None,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_that_is_not_rows_of_three_is_refused(table):
    accepted = ("newton_schulz", "coefficients", "three finite numbers (a, b, c)", repr(table))
    with pytest.raises(ValueError, match=says(*accepted)):
        newton_schulz(jnp.ones((3, 4)), table)


def test_a_bad_table_is_refused_by_the_transform_too():
    transform = orthax.orthogonalize(newton_schulz, coefficients=())
    with pytest.raises(ValueError, match=says("newton_schulz", "coefficients", "()")):
        transform.update({"w": jnp.ones((3, 4))}, optax.EmptyState())


MATRIX_FUNCTIONS = [newton_schulz, gram_newton_schulz, zolotarev, polar, polar_svd]


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_a_function_of_matrices_refuses_a_vector(function):
    with pytest.raises(ValueError, match=says(function.__name__, "(3,)", "two axes")):
        function(jnp.ones(3))


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_a_function_of_matrices_refuses_integers(function):
    with pytest.raises(TypeError, match=says(function.__name__, "int32", "floating")):
        function(jnp.ones((3, 4), jnp.int32))


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_a_function_of_matrices_refuses_a_list(function):
    with pytest.raises(TypeError, match=says(function.__name__, "x must be an array", "list")):
        function([[1.0, 2.0], [3.0, 4.0]])


# --- numbers


@pytest.mark.parametrize(
    ("factory", "argument"),
    [
        (orthax.clip_by_quantile, "quantile"),
        (orthax.scale_by_cosh_rms, "gamma"),
        (orthax.normalize_neurons, "decay"),
        (orthax.normalize_neurons, "eps"),
    ],
)
@pytest.mark.parametrize("value", ["0.9", None, (0.9,)], ids=str)
def test_what_is_no_number_is_refused(factory, argument, value):
    with pytest.raises(TypeError, match=says(factory.__name__, argument, "number", repr(value))):
        factory(**{argument: value})


# --- leaves


@every_transform
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_vector_leaf_is_named_with_the_way_out(name, compiled):
    transform = TRANSFORMS[name]
    state = transform.init({"dense": {"kernel": PARAMS["dense"]["kernel"]}})
    update = jax.jit(transform.update) if compiled else transform.update
    with pytest.raises(ValueError, match=says(name, "'dense/bias'", "(4,)", "as_matrices")):
        update(PARAMS, state)


@every_transform
def test_an_integer_leaf_is_named(name):
    transform = TRANSFORMS[name]
    state = transform.init({"table": [jnp.ones((3, 4))]})
    with pytest.raises(TypeError, match=says(name, "'table/0'", "int32", "floating")):
        transform.update({"table": [jnp.ones((3, 4), jnp.int32)]}, state)


@every_transform
def test_a_python_number_is_refused_as_a_leaf_without_axes(name):
    transform = TRANSFORMS[name]
    state = transform.init({})
    with pytest.raises(ValueError, match=says(name, "'temperature'", "()")):
        transform.update({"temperature": 1.0}, state)


@pytest.mark.parametrize(
    "tree", [PARAMS, jax.eval_shape(lambda: PARAMS)], ids=["array", "abstract"]
)
def test_a_transform_with_a_state_names_the_leaf_at_init(tree):
    with pytest.raises(ValueError, match=says("normalize_neurons", "'dense/bias'", "(4,)")):
        orthax.normalize_neurons().init(tree)


# --- numbers out of range


@pytest.mark.parametrize("decay", [1, 1.0, 1.5, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=says("normalize_neurons", "decay", "[0, 1)", repr(decay))):
        orthax.normalize_neurons(decay)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_normuon_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=says("decay", "[0, 1)", repr(decay))):
        orthax.normuon(0.1, decay=decay)


@pytest.mark.parametrize("eps", [-1e-8, float("nan")])
def test_a_negative_eps_is_refused(eps):
    with pytest.raises(ValueError, match=says("normalize_neurons", "eps", "at least 0", repr(eps))):
        orthax.normalize_neurons(eps=eps)


@pytest.mark.parametrize(
    "quantile", [-0.1, 1.1, 90, float("nan"), np.float32(1.5), jnp.float32(-1)]
)
@pytest.mark.parametrize(
    "factory",
    [orthax.clip_by_quantile, functools.partial(orthax.root, 0.1)],
    ids=["clip_by_quantile", "root"],
)
def test_a_quantile_outside_its_range_is_refused(factory, quantile):
    accepted = ("clip_by_quantile", "quantile", "[0, 1]", repr(quantile))
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(quantile=quantile)


COSH = {
    "scale_by_cosh_rms": orthax.scale_by_cosh_rms,
    "auon": functools.partial(orthax.auon, 0.1),
    "hybrid_auon": functools.partial(orthax.hybrid_auon, 0.1),
}


@pytest.mark.parametrize("gamma", [-1, -0.1, float("nan"), float("inf"), np.float32(-3)])
@pytest.mark.parametrize("factory", COSH.values(), ids=COSH)
def test_a_gamma_outside_its_range_is_refused(factory, gamma):
    accepted = ("scale_by_cosh_rms", "gamma", "at least 0", repr(gamma))
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(gamma=gamma)


@pytest.mark.parametrize("mode", ["Paper", 1, None])
@pytest.mark.parametrize("factory", [COSH[name] for name in COSH if name != "hybrid_auon"])
def test_an_unknown_mode_is_refused_with_the_known_ones(factory, mode):
    accepted = ("scale_by_cosh_rms", "mode", "paper", "code", "rms", repr(mode))
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(mode=mode)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_below_one_is_refused(steps):
    with pytest.raises(ValueError, match=says("hybrid_auon", "steps", "at least 1", repr(steps))):
        orthax.hybrid_auon(0.1, steps=steps)


@pytest.mark.parametrize("steps", [1.0, "1", None, True, jnp.int32(1)])
def test_steps_that_are_no_integer_are_refused(steps):
    with pytest.raises(TypeError, match=says("hybrid_auon", "steps", "integer", repr(steps))):
        orthax.hybrid_auon(0.1, steps=steps)


@pytest.mark.parametrize("momentum", [1, 1.0, 1.5, -0.1, float("nan")])
@every_optimizer
def test_a_momentum_outside_its_range_is_refused(name, momentum):
    with pytest.raises(ValueError, match=says(name, "momentum", "[0, 1)", repr(momentum))):
        OPTIMIZERS[name](0.1, momentum)


@pytest.mark.parametrize("weight_decay", [-1, -0.1, float("nan"), float("inf")])
@every_optimizer
def test_a_weight_decay_outside_its_range_is_refused(name, weight_decay):
    accepted = (name, "weight_decay", "at least 0", repr(weight_decay))
    with pytest.raises(ValueError, match=says(*accepted)):
        OPTIMIZERS[name](0.1, weight_decay=weight_decay)


@pytest.mark.parametrize("axis", ["rows", -2, None])
def test_an_unknown_axis_is_refused_with_the_known_ones(axis):
    accepted = ("normalize_neurons", "axis", "output", "long", repr(axis))
    with pytest.raises(ValueError, match=says(*accepted)):
        orthax.normalize_neurons(axis=axis)


@pytest.mark.parametrize("direction", ["unit", 2, None])
def test_an_unknown_direction_is_refused_with_the_known_ones(direction):
    accepted = ("scale_by_adam_rms", "direction", "orthogonal", "unit_norm", repr(direction))
    with pytest.raises(ValueError, match=says(*accepted)):
        orthax.scale_by_adam_rms(direction=direction)


# --- arguments of the wrong type


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("orthogonalizer", newton_schulz),
        ("orthogonalizer", orthax.orthogonalize),
        ("orthogonalizer", None),
        ("shape_scale", 0.2),
        ("shape_scale", "spectral"),
        ("shape_scale", orthax.scale_by_width),
        ("fallback", 1e-3),
        ("fallback", optax.adamw),
    ],
)
@every_optimizer
def test_a_part_that_is_no_transformation_is_refused(name, argument, value):
    if argument not in inspect.signature(OPTIMIZERS[name]).parameters:
        return  # AuON has no orthogonalizer
    accepted = (name, argument, "optax transformation", repr(value))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](0.1, **{argument: value})


@pytest.mark.parametrize("momentum", ["0.95", None, [0.95], optax.trace, lambda count: 0.9])
@every_optimizer
def test_a_momentum_of_the_wrong_type_is_refused(name, momentum):
    accepted = (name, "momentum", "number in [0, 1)", "transformation", repr(momentum))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](0.1, momentum)


@pytest.mark.parametrize("value", ["0.1", None, [0.1], optax.scale(0.1)])
@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
@every_optimizer
def test_what_is_neither_a_number_nor_a_schedule_is_refused(name, argument, value):
    accepted = (name, argument, "number or a schedule", repr(value))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](**{"learning_rate": 0.1, argument: value})


@pytest.mark.parametrize("momentum", [np.float32(0.9), jnp.float32(0.9), np.asarray(0.9), 0])
@every_optimizer
def test_a_number_of_any_kind_is_accepted(name, momentum):
    optimizer = OPTIMIZERS[name](0.1, momentum, weight_decay=momentum)
    assert isinstance(optimizer, optax.GradientTransformation)


# --- params


@every_optimizer
@pytest.mark.parametrize("params", [PARAMS, {"bias": jnp.ones(4)}], ids=["matrix", "vector"])
@pytest.mark.parametrize("mask", [None, True], ids=["all", "masked"])
def test_decay_without_params_names_the_optimizer_and_the_argument(name, params, mask):
    optimizer = OPTIMIZERS[name](0.1, weight_decay=0.25, mask=mask)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=says(name, "weight_decay=0.25", "params")):
        optimizer.update(params, state)
