"""Bad input is refused in the caller's words: the call, the argument, the value, what is accepted.

Errors about axes and trees of dimension numbers are in test_matrices.py.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import says

import orthax
from orthax.linalg import gram_newton_schulz, newton_schulz, polar, polar_svd, zolotarev

OPTIMIZERS = {
    "muon": orthax.muon,
    "normuon": orthax.normuon,
    "root": orthax.root,
    "auon": orthax.auon,
    "hybrid_auon": orthax.hybrid_auon,
    "trion": orthax.trion,
    "dct_adamw": orthax.dct_adamw,
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
    "low_rank": orthax.low_rank(optax.scale_by_adam(), 2),
    "scale_by_adam_per_index": orthax.scale_by_adam_per_index(),
    "keep_orthogonal": orthax.keep_orthogonal(),
    "project_tangent": orthax.project_tangent(),
    "keep_unit_neurons": orthax.keep_unit_neurons(),
    "keep_norm": orthax.keep_norm(),
}
PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
WITH_MOMENTUM = [
    name for name in OPTIMIZERS if "momentum" in inspect.signature(OPTIMIZERS[name]).parameters
]
every_optimizer_with_momentum = pytest.mark.parametrize("name", WITH_MOMENTUM)
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


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
        (orthax.scale_by_adam_per_index, "b1"),
        (orthax.scale_by_adam_per_index, "b2"),
        (orthax.scale_by_adam_per_index, "eps"),
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
        update(PARAMS, state, PARAMS)


@every_transform
def test_an_integer_leaf_is_named(name):
    transform = TRANSFORMS[name]
    state = transform.init({"table": [jnp.ones((3, 4))]})
    integers = {"table": [jnp.ones((3, 4), jnp.int32)]}
    with pytest.raises(TypeError, match=says(name, "'table/0'", "int32", "floating")):
        transform.update(integers, state, integers)


@every_transform
def test_a_python_number_is_refused_as_a_leaf_without_axes(name):
    transform = TRANSFORMS[name]
    state = transform.init({})
    with pytest.raises(ValueError, match=says(name, "'temperature'", "()")):
        transform.update({"temperature": 1.0}, state, {"temperature": 1.0})


@pytest.mark.parametrize(
    "tree", [PARAMS, jax.eval_shape(lambda: PARAMS)], ids=["array", "abstract"]
)
@pytest.mark.parametrize("name", ["normalize_neurons", "low_rank", "scale_by_adam_per_index"])
def test_a_transform_with_a_state_names_the_leaf_at_init(name, tree):
    with pytest.raises(ValueError, match=says(name, "'dense/bias'", "(4,)")):
        TRANSFORMS[name].init(tree)


@pytest.mark.parametrize("name", ["normalize_neurons", "low_rank", "scale_by_adam_per_index"])
def test_a_transform_with_a_state_names_an_integer_leaf_at_init(name):
    with pytest.raises(TypeError, match=says(name, "'table/0'", "int32", "floating")):
        TRANSFORMS[name].init({"table": [jnp.ones((3, 4), jnp.int32)]})


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
@every_optimizer_with_momentum
def test_a_momentum_outside_its_range_is_refused(name, momentum):
    with pytest.raises(ValueError, match=says(name, "momentum", "[0, 1)", repr(momentum))):
        OPTIMIZERS[name](0.1, momentum=momentum)


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


# --- low rank


TRACE = optax.trace(0.9)
LOW_RANK = {
    "low_rank": functools.partial(orthax.low_rank, TRACE),
    "trion": functools.partial(orthax.trion, 0.1),
    "dct_adamw": functools.partial(orthax.dct_adamw, 0.1),
}
every_low_rank = pytest.mark.parametrize("factory", LOW_RANK.values(), ids=LOW_RANK)
MATRIX = {"up": [jnp.ones((6, 16))]}


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, float("nan"), np.float32(2), np.int64(0)])
@every_low_rank
def test_a_rank_outside_its_range_is_refused(factory, rank):
    accepted = ("low_rank", "rank", "integer", "(0, 1]", "function", f"got {rank!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(rank=rank)


@pytest.mark.parametrize("rank", ["8", None, True, [8], jnp.int32(8), jnp.ones(2)], ids=repr)
@every_low_rank
def test_a_rank_of_the_wrong_type_is_refused_with_the_way_to_inject(factory, rank):
    accepted = ("low_rank", "rank", "integer", "(0, 1]", f"got {rank!r}", "static_args")
    with pytest.raises(TypeError, match=says(*accepted)):
        factory(rank=rank)


@pytest.mark.parametrize("found", [0, -3, 2.5, True, None, "2"])
@pytest.mark.parametrize("moment", ["init", "update"])
def test_a_rank_function_that_gives_no_rank_is_refused_with_the_leaf(found, moment):
    good = orthax.low_rank(TRACE, 2).init(MATRIX)
    transform = orthax.low_rank(TRACE, lambda m, n: found)
    call = {
        "init": lambda: transform.init(MATRIX),
        "update": lambda: transform.update(MATRIX, good),
    }[moment]
    accepted = ("low_rank", "rank(6, 16)", "'up/0'", "integer", "at least 1", f"got {found!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        call()


@pytest.mark.parametrize("name", ["trion", "dct_adamw"])
def test_the_optimizers_name_the_leaf_of_a_bad_rank(name):
    optimizer = OPTIMIZERS[name](0.1, lambda m, n: m - n)
    with pytest.raises(ValueError, match=says("low_rank", "'dense/kernel'", "got -1")):
        optimizer.init(PARAMS)


def test_a_number_of_numpy_is_a_rank():
    for rank in (np.int64(2), np.float32(0.5), 0.5, np.float64(1.0)):
        assert isinstance(orthax.low_rank(TRACE, rank), optax.GradientTransformation)


@pytest.mark.parametrize("rank", [1.0, np.float32(1)])
def test_one_as_a_fraction_is_the_whole_side(rank):
    state = orthax.low_rank(TRACE, rank).init(MATRIX)
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


BASES = ("dct", "dct3", "random", "hadamard", "columns", "svd", "subspace")


@pytest.mark.parametrize("basis", ["DCT", "fft", None, 3])
@every_low_rank
def test_an_unknown_basis_is_refused_with_the_known_ones(factory, basis):
    with pytest.raises(ValueError, match=says("low_rank", "basis", *BASES, f"got {basis!r}")):
        factory(rank=2, basis=basis)


@pytest.mark.parametrize("ranking", ["L2", "linf", None, 2])
@every_low_rank
def test_an_unknown_ranking_is_refused_with_the_known_ones(factory, ranking):
    accepted = ("low_rank", "ranking", "l1", "l2", f"got {ranking!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(rank=2, ranking=ranking)


@pytest.mark.parametrize("rounding", ["up", None, True])
def test_an_unknown_rounding_is_refused_with_the_known_ones(rounding):
    accepted = ("low_rank", "rounding", "nearest", "stochastic", f"got {rounding!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        orthax.low_rank(TRACE, 2, retain=0.5, rounding=rounding)


@pytest.mark.parametrize("bias_correction", ["none", None, True])
def test_an_unknown_bias_correction_is_refused_with_the_known_ones(bias_correction):
    known = ("dct_adamw", "bias_correction", "per_index", "global", f"got {bias_correction!r}")
    with pytest.raises(ValueError, match=says(*known)):
        orthax.dct_adamw(0.1, bias_correction=bias_correction)


@pytest.mark.parametrize("update_every", [0, -1])
@every_low_rank
def test_an_interval_below_one_is_refused(factory, update_every):
    accepted = ("low_rank", "update_every", "at least 1", f"got {update_every!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(rank=2, update_every=update_every)


@pytest.mark.parametrize("update_every", [1.5, 2.0, "1", None, True, jnp.int32(2)], ids=repr)
@every_low_rank
def test_an_interval_that_is_no_integer_is_refused(factory, update_every):
    accepted = ("low_rank", "update_every", "integer", f"got {update_every!r}", "static_args")
    with pytest.raises(TypeError, match=says(*accepted)):
        factory(rank=2, update_every=update_every)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match=says("low_rank", "seed", "at least 0", "got -1")):
        orthax.low_rank(TRACE, 2, seed=-1)


@pytest.mark.parametrize("seed", [0.5, "0", None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match=says("low_rank", "seed", "integer", f"got {seed!r}")):
        orthax.low_rank(TRACE, 2, seed=seed)


@pytest.mark.parametrize("retain", [1, 1.0, -0.1, float("nan"), np.float32(2), jnp.float32(1)])
def test_a_part_to_retain_outside_its_range_is_refused(retain):
    with pytest.raises(ValueError, match=says("low_rank", "retain", "[0, 1)", f"got {retain!r}")):
        orthax.low_rank(TRACE, 2, retain=retain)


@pytest.mark.parametrize("retain", ["0", (0.5,), optax.trace])
def test_a_part_to_retain_that_is_no_number_is_refused(retain):
    with pytest.raises(TypeError, match=says("low_rank", "retain", "number", f"got {retain!r}")):
        orthax.low_rank(TRACE, 2, retain=retain)


BUFFERS = {
    "low_rank": (functools.partial(orthax.low_rank, TRACE, 2, retain=0.5), "buffer_dtype"),
    "without a buffer": (functools.partial(orthax.low_rank, TRACE, 2), "buffer_dtype"),
    "trion": (functools.partial(orthax.trion, 0.1), "mu_dtype"),
    "dct_adamw": (functools.partial(orthax.dct_adamw, 0.1), "buffer_dtype"),
}
every_buffer = pytest.mark.parametrize(("factory", "argument"), BUFFERS.values(), ids=BUFFERS)


@pytest.mark.parametrize("dtype", [jnp.int8, "int2", "uint8", bool, np.dtype("int32")], ids=repr)
@every_buffer
def test_a_buffer_of_integers_other_than_the_known_ones_is_refused(factory, argument, dtype):
    accepted = ("low_rank", "buffer_dtype", "floating", "int8", "int4", f"got {dtype!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(**{argument: dtype})


@pytest.mark.parametrize("dtype", ["int3", 8, "half a byte"], ids=str)
@every_buffer
def test_a_buffer_of_what_is_no_dtype_is_refused(factory, argument, dtype):
    accepted = ("low_rank", "buffer_dtype", "floating", "int8", "int4", f"got {dtype!r}")
    with pytest.raises(TypeError, match=says(*accepted)):
        factory(**{argument: dtype})


@pytest.mark.parametrize("dtype", ["int8", "int4", jnp.bfloat16, "float32"], ids=str)
def test_a_complex_leaf_is_refused_for_a_real_buffer(dtype):
    transform = orthax.low_rank(TRACE, 2, retain=0.5, buffer_dtype=dtype)
    params = {"real": jnp.ones((6, 16)), "waves": [jnp.ones((6, 16), jnp.complex64)]}
    with pytest.raises(TypeError, match=says("low_rank", "'waves/0'", "complex", repr(dtype))):
        transform.init(params)


def test_a_side_without_a_hadamard_matrix_is_named_at_init():
    transform = orthax.low_rank(TRACE, 2, basis="hadamard")
    params = {"fits": jnp.ones((8, 6, 12, 16)), "up": [jnp.ones((6, 16))]}
    with pytest.raises(ValueError, match=says("low_rank", "'up/0'", "size 6", "12, 20, 24")):
        transform.init(params)


def test_a_side_without_a_hadamard_matrix_passes_where_nothing_is_projected():
    state = orthax.low_rank(TRACE, 6, basis="hadamard").init(MATRIX)
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


@pytest.mark.parametrize("name", ["trion", "dct_adamw"])
def test_the_optimizers_name_the_leaf_without_a_hadamard_matrix(name):
    optimizer = OPTIMIZERS[name](0.1, 2, basis="hadamard")
    with pytest.raises(ValueError, match=says("low_rank", "'dense/kernel'", "size 3")):
        optimizer.init(PARAMS)


@pytest.mark.parametrize("inner", [optax.trace, None, 0.9, "adam", lambda g: g])
def test_an_inner_that_is_no_transformation_is_refused(inner):
    with pytest.raises(TypeError, match=says("low_rank", "inner", "optax transformation")):
        orthax.low_rank(inner, 2)


# Adafactor's moments have no entry for each coordinate; those of `flatten` are one vector.
FACTORED = optax.scale_by_factored_rms(min_dim_size_to_factor=2)


@pytest.mark.parametrize(
    "inner",
    [FACTORED, optax.chain(optax.trace(0.9), FACTORED)],
    ids=["alone", "in a chain"],
)
def test_factored_moments_are_refused_at_init_with_their_names(inner):
    names = ("low_rank", "v_row", "state of inner", "'up/0'", "(2, 16)", "change of subspace")
    with pytest.raises(ValueError, match=says(*names)):
        orthax.low_rank(inner, 2).init(MATRIX)


def test_flattened_moments_are_refused_at_init():
    transform = orthax.low_rank(optax.flatten(TRACE), 2)
    with pytest.raises(ValueError, match=says("low_rank", "state of inner", "change of subspace")):
        transform.init(MATRIX)


ADAM = {
    "scale_by_adam_per_index": orthax.scale_by_adam_per_index,
    "dct_adamw": functools.partial(orthax.dct_adamw, 0.1),
    "dct_adamw(global)": functools.partial(orthax.dct_adamw, 0.1, bias_correction="global"),
}
every_adam = pytest.mark.parametrize("factory", ADAM.values(), ids=ADAM)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), np.float32(2)])
@pytest.mark.parametrize("argument", ["b1", "b2"])
@every_adam
def test_a_decay_of_moments_outside_its_range_is_refused(factory, argument, value):
    accepted = ("scale_by_adam_per_index", argument, "[0, 1)", f"got {value!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(**{argument: value})


@pytest.mark.parametrize("eps", [-1e-8, float("nan")])
@every_adam
def test_a_negative_eps_of_moments_is_refused(factory, eps):
    accepted = ("scale_by_adam_per_index", "eps", "at least 0", f"got {eps!r}")
    with pytest.raises(ValueError, match=says(*accepted)):
        factory(eps=eps)


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
        return  # AuON has no orthogonalizer, DCT-AdamW no part but the fallback
    accepted = (name, argument, "optax transformation", repr(value))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](0.1, **{argument: value})


@pytest.mark.parametrize("momentum", ["0.95", None, [0.95], optax.trace, lambda count: 0.9])
@every_optimizer_with_momentum
def test_a_momentum_of_the_wrong_type_is_refused(name, momentum):
    also = ["transformation"] if name != "trion" else []  # Trion's is a part of low_rank
    accepted = (name, "momentum", "number in [0, 1)", *also, repr(momentum))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](0.1, momentum=momentum)


def test_trion_refuses_a_transformation_as_momentum():
    with pytest.raises(TypeError, match=says("trion", "momentum", "number in [0, 1)", "Gradient")):
        orthax.trion(0.1, momentum=optax.trace(0.9))


@pytest.mark.parametrize("value", ["0.1", None, [0.1], optax.scale(0.1)])
@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay"])
@every_optimizer
def test_what_is_neither_a_number_nor_a_schedule_is_refused(name, argument, value):
    accepted = (name, argument, "number or a schedule", repr(value))
    with pytest.raises(TypeError, match=says(*accepted)):
        OPTIMIZERS[name](**{"learning_rate": 0.1, argument: value})


@pytest.mark.parametrize("momentum", [np.float32(0.9), jnp.float32(0.9), np.asarray(0.9), 0])
@every_optimizer_with_momentum
def test_a_number_of_any_kind_is_accepted(name, momentum):
    optimizer = OPTIMIZERS[name](0.1, momentum=momentum, weight_decay=momentum)
    assert isinstance(optimizer, optax.GradientTransformation)


@pytest.mark.parametrize("number", [np.float32(0.9), jnp.float32(0.9), np.asarray(0.9), 0])
@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_moments_of_any_kind_of_number_are_accepted(bias_correction, number):
    optimizer = orthax.dct_adamw(
        0.1,
        b1=number,
        b2=number,
        eps=number,
        weight_decay=number,
        bias_correction=bias_correction,
    )
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
