"""What optax users may expect of any transformation, for every row of `contract_cases.CASES`."""

import contextlib
import functools
import re

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
import tolerances
from contract_cases import CASES, grads_of, is_matrix, normal_tree, params_of
from jax.extend.core import Var

# The same sum in another order; Newton-Schulz steps amplify its error.
REORDERED = tolerances.rounding(np.float32, gain=100)


def each(cases):
    """Tests of one case run one after the other, so that they share what is compiled for it."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name, scope="module")


every_case = each(CASES)
every_optimizer = each([case for case in CASES if "learning_rate" in case.kwargs])
cases_with_numbers = each([case for case in CASES if case.numbers])


@functools.cache
def built(name):
    """The transformation of a row and its compiled update; one for all tests."""
    (case,) = [case for case in CASES if case.name == name]
    transformation = case.build()
    return transformation, jax.jit(transformation.update)


def steps_of(transformation, params, grads, update=None):
    """Updates of each gradient at fixed params, and the last state."""
    update = update or jax.jit(transformation.update)
    state, results = transformation.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        results.append(updates)
    return results, state


def assert_close(actual, expected, tolerance=REORDERED):
    """Equal trees of equal shapes, each leaf within a part of its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert x.shape == y.shape, path
        x, y = oracles.float64(x), oracles.float64(y)
        largest = np.abs(y).max(initial=0)
        error = np.abs(x - y).max(initial=0)
        assert error <= tolerance * largest, (jax.tree_util.keystr(path), error, largest)


def assert_equal(actual, expected):
    assert_close(actual, expected, 0)


def assert_finite(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(oracles.float64(x)).all(), jax.tree_util.keystr(path)


def types_of(tree):
    """Shape, dtype and weak type of every leaf, in the tree's structure."""

    def type_of(x):
        x = jax.typeof(x) if isinstance(x, jax.Array) else x
        return f"{x.shape} {x.dtype} {x.weak_type}"

    return jax.tree.map(type_of, tree)


def precision(dtype):
    """float64 needs jax_enable_x64."""
    if dtype != "float64":
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


def select(mask, tree):
    """The tree with `optax.MaskedNode` where the mask is False."""
    return jax.tree.map(lambda keep, leaf: leaf if keep else optax.MaskedNode(), mask, tree)


@functools.cache
def after_two_steps(name):
    """A transformation for a tree with 1-D leaves, its params and state, and a third step."""
    (case,) = [case for case in CASES if case.name == name]
    transformation, update = built(name)
    params, (*grads, last) = params_of(case), grads_of(case, 3)
    if not case.any_tree:
        transformation = optax.masked(transformation, is_matrix)
        update = jax.jit(transformation.update)
        for tree in (params, *grads, last):
            tree["vector"] = jnp.ones(3)
    _, state = steps_of(transformation, params, grads, update)
    return transformation, params, state, lambda state: update(last, state, params)


# --- compilation


@every_case
def test_two_calls_trace_once(case):
    (transformation, update), params, (g,) = built(case.name), params_of(case), grads_of(case)
    state = transformation.init(params)
    _, new_state = update(g, state, params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(transformation.update, n=1))
    update.trace(g, state, params)
    update.trace(g, new_state, params)


# Every operation of an eager update is compiled by itself; those of an optimizer are the others'.
@each([case for case in CASES if not case.any_tree or case.name in ("muon", "dct_adamw")])
def test_a_compiled_update_is_the_eager_one(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 2)
    compiled, compiled_state = steps_of(transformation, params, grads, update)
    eager, eager_state = steps_of(transformation, params, grads, transformation.update)
    assert_close(compiled, eager)
    assert_close(compiled_state, eager_state)


@every_case
def test_buffers_of_params_and_state_can_be_donated(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 2)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(g, state, params):
        updates, state = transformation.update(g, state, params)
        return optax.apply_updates(params, updates), state

    donated, donated_state = params, transformation.init(params)
    params = jax.tree.map(jnp.copy, params)
    state = transformation.init(params)
    for g in grads:
        given = jax.tree.leaves((donated, donated_state))
        donated, donated_state = step(g, donated_state, donated)
        # Indices of a subspace that is chosen anew are not even read.
        assert all(x.is_deleted() for x in given if x.ndim > 1 and x.dtype != jnp.int32)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(donated, params)
    assert_close(donated_state, state)


@every_case
def test_a_scan_over_gradients_is_the_loop(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 3)
    expected, expected_state = steps_of(transformation, params, grads, update)

    def step(state, g):
        updates, state = transformation.update(g, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    state, updates = jax.lax.scan(step, transformation.init(params), stacked)
    assert_close(updates, jax.tree.map(lambda *xs: jnp.stack(xs), *expected))
    assert_close(state, expected_state)


# --- settings of JAX


def without_adam(case):
    """The row with SGD in the place of optax's Adam, which mixes dtypes itself."""
    inner = {"inner": optax.trace(0.9)} if "scale_by_adam" in repr(case.kwargs.get("inner")) else {}
    fallback = {"fallback": optax.sgd(0.1)} if "learning_rate" in case.kwargs else {}
    biased = case.kwargs.get("bias_correction") == "global"
    return {**inner, **fallback, **({"bias_correction": "per_index"} if biased else {})}


# float16 is widened before it is computed with, so that only bfloat16 may meet float32. Where a
# momentum is asked for in another dtype, it is optax that adds gradients to it.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_dtypes_are_not_mixed_and_ranks_not_promoted(case, dtype):
    if dtype == "bfloat16" and case.kwargs.get("mu_dtype"):
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        transformation = case.build(**without_adam(case))
        params, (g,) = params_of(case, dtype), grads_of(case, dtype=dtype)
        state = jax.eval_shape(transformation.init, params)
        jax.eval_shape(transformation.update, g, state, params)


@cases_with_numbers
def test_injected_numbers_are_not_mixed_with_other_dtypes(case):
    with jax.numpy_dtype_promotion("strict"):
        transformation = case.injected(**case.values(), **without_adam(case))
        params, (g,) = params_of(case), grads_of(case)
        state = transformation.init(params)
        jax.eval_shape(transformation.update, g, state, params)


@every_case
def test_float32_stays_float32_where_float64_is_enabled(case):
    with precision("float64"):
        transformation, _ = built(case.name)
        params, (g,) = params_of(case), grads_of(case)
        state = transformation.init(params)
        updates, new_state = jax.eval_shape(transformation.update, g, state, params)
        assert types_of(updates) == types_of(g)
        assert types_of(new_state) == types_of(state)
        # Scalars are Python's.
        assert not re.search(r"(f64|c128)\[\d", program(transformation.update, g, state, params))
    assert types_of(transformation.init(params)) == types_of(state)


@every_case
def test_no_tracer_leaks_and_nothing_is_copied_to_a_device_or_back(case):
    (transformation, update), params, (g,) = built(case.name), params_of(case), grads_of(case)
    state = transformation.init(params)
    with jax.checking_leaks():
        jax.eval_shape(transformation.init, params)
        jax.eval_shape(transformation.update, g, state, params)
    with jax.transfer_guard("disallow"):
        update(g, state, params)


@every_case
def test_nothing_is_nan_on_the_way(case):
    (transformation, update), params, (g,) = built(case.name), params_of(case), grads_of(case)
    zeros = jax.tree.map(jnp.zeros_like, g)
    with jax.debug_nans(True):
        state = transformation.init(params)
        for gradient in (g, zeros, g):
            _, state = update(gradient, state, params)
        _, state = update(zeros, transformation.init(params), params)
        update(g, state, params)
        update(zeros, transformation.init(zeros), zeros)


# In the others the steps are those of these.
differentiated = [
    case for case in CASES if not case.any_tree or case.name in ("normuon", "dct_adamw")
]
# Loops whose length depends on values, and decompositions, have no derivative to speak of.
without_gradient = ("keep_orthogonal", "orthogonalize(polar_svd)", "low_rank(svd)")
without_gradient += ("low_rank(subspace)",)


@each([case for case in differentiated if case.name not in without_gradient])
def test_gradients_through_an_update_are_finite_where_neurons_are_dead(case):
    # Optax's own Adam has none at a moment of zero without `eps_root`; the default fallback has.
    options = without_adam(case)
    options.pop("fallback", None)
    if "inner" in options:
        options["inner"] = optax.scale_by_adam(eps_root=1e-8)
    transformation = case.build(**options)
    if case.numbers:
        transformation = case.injected(**case.values(), **options)
    params, (g,) = params_of(case), grads_of(case)
    zeros = jax.tree.map(jnp.zeros_like, g)
    column, row = (
        jax.tree.map(lambda x, at=at: x.at[at if x.ndim > 1 else 1].set(0) if x.ndim else x, g)
        for at in (np.s_[..., 1], np.s_[..., 1, :])
    )
    state = transformation.init(params)
    numbers = state.hyperparams if case.numbers else {}

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def slopes(numbers, g, params, state):
        state = state._replace(hyperparams=numbers) if case.numbers else state
        updates, state = transformation.update(g, state, params)
        return sum(jnp.sum(jnp.sin(x + 1)) for x in jax.tree.leaves(updates)), state

    for gradient in (g, column, row, zeros):
        first, after = slopes(numbers, gradient, params, state)
        second, _ = slopes(numbers, gradient, params, after)
        assert_finite((first, second))


# --- arguments


def program(function, *arguments):
    # Old versions of JAX print where in memory a function lies.
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


@every_case
def test_unknown_extra_arguments_are_ignored(case):
    (transformation, _), params, (g,) = built(case.name), params_of(case), grads_of(case)
    state = transformation.init(params)
    update = transformation.update
    if not case.any_tree:  # optax.chain and the other wrappers do this for a plain transformation
        update = optax.with_extra_args_support(transformation).update
    extra = {"value": 1.0, "nobody_knows_this": jnp.ones(2)}
    with_extra = functools.partial(update, **extra)
    assert program(with_extra, g, state, params) == program(update, g, state, params)


@every_case
def test_params_are_needed_only_where_the_table_says_so(case):
    (transformation, update), params, (g,) = built(case.name), params_of(case), grads_of(case)
    state = transformation.init(params)
    if case.needs_params:
        with pytest.raises(ValueError, match="params"):
            transformation.update(g, state)
    else:
        given = functools.partial(transformation.update, params=params)
        if program(given, g, state) != program(transformation.update, g, state):
            assert_close(update(g, state), update(g, state, params))


# --- dtypes and the state


# The others use float32, and one of them leaves of bfloat16 too.
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@every_case
def test_updates_keep_the_dtype_of_gradients_and_states_their_types(case, dtype):
    with precision(dtype):
        transformation, _ = built(case.name)
        params, (g,) = params_of(case, dtype), grads_of(case, dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        state = transformation.init(params)
        updates, new_state = jax.eval_shape(transformation.update, g, state, params)
        assert types_of(updates) == types_of(g)
        assert types_of(new_state) == types_of(state)


# What mixed precision makes: params, gradients.
PAIRS = (
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
    ("float16", "float32"),
    ("bfloat16", "float16"),
)


@every_case
def test_gradients_in_another_dtype_than_params_change_no_state_and_narrow_no_update(case):
    transformation, _ = built(case.name)
    params, (g,) = params_of(case), grads_of(case)

    def as_in(tree, which, turn):
        leaves, structure = jax.tree.flatten(tree)
        dtypes = [PAIRS[(i + turn) % len(PAIRS)][which] for i in range(len(leaves))]
        return structure.unflatten(x.astype(d) for x, d in zip(leaves, dtypes, strict=True))

    for turn in (0, 2):  # so that each leaf has two pairs
        mixed_params, mixed = as_in(params, 0, turn), as_in(g, 1, turn)
        state = jax.eval_shape(transformation.init, mixed_params)
        updates, new_state = jax.eval_shape(transformation.update, mixed, state, mixed_params)
        assert types_of(new_state) == types_of(state)
        if "learning_rate" in case.kwargs:  # an optimizer: its updates are added to the params
            wider = jax.tree.map(lambda p, g: jnp.zeros(p.shape, p.dtype) + g, mixed_params, mixed)
            assert types_of(updates) == types_of(wider)


@every_case
def test_leaves_of_a_tree_keep_their_own_dtypes(case):
    transformation, _ = built(case.name)
    dtypes = [np.float32, jnp.bfloat16, np.float16]

    def mixed(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(x.astype(dtypes[i % 3]) for i, x in enumerate(leaves))

    params, g = mixed(params_of(case)), mixed(grads_of(case)[0])
    state = transformation.init(params)
    updates, new_state = jax.eval_shape(transformation.update, g, state, params)
    assert types_of(updates) == types_of(g)
    assert types_of(new_state) == types_of(state)


@every_case
def test_weakly_typed_params_give_a_strongly_typed_state(case):
    transformation, _ = built(case.name)
    params, (g,) = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), params_of(case)), grads_of(case)
    assert all(leaf.weak_type for leaf in jax.tree.leaves(params))
    state = transformation.init(params)
    for gradient in (g, params):
        _, new_state = jax.eval_shape(transformation.update, gradient, state, params)
        assert types_of(new_state) == types_of(state)


@every_case
def test_the_state_of_abstract_params_is_that_of_params(case):
    (transformation, _), params = built(case.name), params_of(case)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = transformation.init(params)
    assert types_of(transformation.init(abstract)) == types_of(state)
    assert_equal(transformation.init(abstract), state)
    assert types_of(jax.eval_shape(transformation.init, params)) == types_of(state)


LAYOUT = ("reshape", "transpose", "squeeze", "slice", "split", "broadcast_in_dim", "copy")


def computes_on_arguments(jaxpr):
    """Whether a program does more to its arguments than to lay them out, or returns them."""
    given = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        read = [isinstance(x, Var) and x in given for x in equation.invars]
        if not any(read):
            continue
        inner = equation.params.get("jaxpr")  # of a function that is compiled by itself
        inner = getattr(inner, "jaxpr", inner)
        if equation.primitive.name not in LAYOUT and (
            inner is None or computes_on_arguments(inner)
        ):
            return True
        given.update(equation.outvars)
    return False


@every_case
def test_init_computes_nothing_of_the_values_of_leaves(case):
    program = jax.make_jaxpr(built(case.name)[0].init)(params_of(case)).jaxpr
    assert not computes_on_arguments(program), program


@every_case
def test_no_state_holds_an_array_without_entries(case):
    transformation, params, *_ = after_two_steps(case.name)
    assert all(np.size(x) for x in jax.tree.leaves(transformation.init(params)))


@every_case
def test_sixty_large_float16_gradients_stay_finite(case):
    transformation, update = built(case.name)
    params, (g, h) = params_of(case, "float16"), grads_of(case, 2, "float16")
    g, h = (jax.tree.map(lambda x: 2e3 * jnp.sign(x), tree) for tree in (g, h))
    state = transformation.init(params)
    for step in range(60):
        updates, state = update(h if step % 10 == 9 else g, state, params)
        assert_finite(updates)
    assert_finite(state)
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
        assert np.asarray(x).any(), path


@every_case
def test_the_state_survives_flax_serialization(case):
    transformation, params, state, step = after_two_steps(case.name)
    template = transformation.init(params)
    restored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    assert_equal(restored, state)
    assert_equal(step(restored), step(state))
    as_dict = flax.serialization.to_state_dict(state)
    assert_equal(flax.serialization.from_state_dict(template, as_dict), state)


@every_case
def test_the_state_survives_an_orbax_checkpoint(case, tmp_path):
    transformation, params, state, step = after_two_steps(case.name)
    saved = {"params": params, "state": state}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"params": params, "state": transformation.init(params)},
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    assert_equal(restored, saved)
    assert_equal(step(restored["state"]), step(state))


@every_case
def test_map_params_reaches_all_of_the_state_that_follows_params_and_no_counter(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 2)
    _, state = steps_of(transformation, params, grads, update)
    assert_equal(optax.tree.map_params(transformation, lambda x: x, state), state)
    mapped = optax.tree.map_params(
        transformation, lambda x: "params", state, transform_non_params=lambda x: "other"
    )
    kinds = jax.tree.map(
        # A scalar integer counts; whole arrays of them are indices or codes, for each leaf.
        lambda x: "other" if jnp.issubdtype(x.dtype, jnp.integer) and not x.ndim else "params",
        state,
    )
    assert mapped == kinds
    if case.any_tree:
        assert {"params", "other"} <= set(jax.tree.leaves(mapped))


# A packed leaf has a tuple in some states, one entry per section, which no leaf of params matches.
packed = {"normuon(options)", "trion(options)", "dct_adamw(options)"}
leaf_by_leaf = [case for case in CASES if case.name not in packed]


@each(leaf_by_leaf)
def test_map_params_pairs_the_state_with_another_tree_like_params(case):
    (transformation, _), params = built(case.name), params_of(case)
    paths = jax.tree_util.tree_map_with_path(lambda keys, _: jax.tree_util.keystr(keys), params)
    state = transformation.init(params)
    paired = optax.tree.map_params(
        transformation,
        lambda x, path: x if isinstance(x, optax.MaskedNode) else path,
        state,
        paths,
        transform_non_params=lambda x: "",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    for keys, path in jax.tree_util.tree_leaves_with_path(paired):
        assert jax.tree_util.keystr(keys).endswith(path)


# --- optax's wrappers


@every_case
def test_multi_steps_are_one_step_of_the_mean_gradient(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 6)
    means = [jax.tree.map(lambda *xs: sum(xs) / 3, *grads[start : start + 3]) for start in (0, 3)]
    expected, expected_state = steps_of(transformation, params, means, update)
    updates, state = steps_of(optax.MultiSteps(transformation, 3), params, grads)
    assert_close([updates[2], updates[5]], expected)
    assert_close(state.inner_opt_state, expected_state)
    for i in (0, 1, 3, 4):
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates[i]))


@every_case
def test_multi_steps_accept_16_bits(case):
    params, (g,) = params_of(case, "bfloat16"), grads_of(case, dtype="bfloat16")
    wrapped = optax.MultiSteps(built(case.name)[0], 2)
    state = wrapped.init(params)
    updates, new_state = jax.eval_shape(wrapped.update, g, state, params)
    assert types_of(updates) == types_of(g)
    assert types_of(new_state.inner_opt_state) == types_of(state.inner_opt_state)


@every_case
def test_in_a_partition_leaves_are_as_beside_the_others(case):
    (transformation, update), params, (g,) = built(case.name), params_of(case), grads_of(case)
    ours = jax.tree.map(lambda _: True, params)
    ours["Dense_1"]["kernel"] = False
    others = jax.tree.map(lambda ours: not ours, ours)
    (expected,), _ = steps_of(transformation, params, [g], update)

    labels = jax.tree.map(lambda ours: "ours" if ours else "sgd", ours)
    both = optax.partition({"ours": transformation, "sgd": optax.sgd(0.5)}, labels)
    (parted,), _ = steps_of(both, params, [g])
    assert_close(select(ours, parted), select(ours, expected))
    assert_close(select(others, parted), jax.tree.map(lambda x: -0.5 * x, select(others, g)))


def halved(case):
    return {name: 0.5 * value for name, value in case.values().items()}


@functools.cache
def injected(name):
    """The transformation of a row with half of every number injected, and its compiled update."""
    (case,) = [case for case in CASES if case.name == name]
    transformation = case.injected(**halved(case))
    return transformation, jax.jit(transformation.update)


@cases_with_numbers
def test_every_number_can_be_injected_and_changed_in_the_state(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 2)
    expected, _ = steps_of(transformation, params, grads, update)
    transformation, update = injected(case.name)
    initial = transformation.init(params)
    assert initial.hyperparams == pytest.approx(halved(case))
    numbers = {name: jnp.asarray(value) for name, value in case.values().items()}
    state = initial._replace(hyperparams=numbers)
    for g, result in zip(grads, expected, strict=True):
        updates, state = update(g, state, params)
        assert_close(updates, result)
    assert types_of(state) == types_of(initial)


@pytest.mark.parametrize(
    ("dtype", "hyperparam_dtype"),
    [("float16", None), ("bfloat16", "float32")],  # of float32, the test before sees the types
)
@cases_with_numbers
def test_injected_numbers_change_no_dtype(case, dtype, hyperparam_dtype):
    params, (g,) = params_of(case, dtype), grads_of(case, dtype=dtype)
    static = set(case.kwargs) - set(case.numbers)
    injected = optax.inject_hyperparams(case.factory, static, hyperparam_dtype)(**case.kwargs)
    state = injected.init(params)
    updates, new_state = jax.eval_shape(injected.update, g, state, params)
    assert types_of(updates) == types_of(g)
    assert types_of(new_state) == types_of(state)


# It is optax that follows them, so one row of a kind is enough.
@each([case for case in CASES if case.numbers and "(" not in case.name])
def test_injected_schedules_are_followed(case):
    params, grads = params_of(case), grads_of(case, 2)
    schedules = {
        name: functools.partial(lambda value, count: value * (0.5 + 0.5 * count), value)
        for name, value in case.values().items()
    }
    updates, _ = steps_of(case.injected(**schedules), params, grads)
    transformation, update = injected(case.name)
    state = transformation.init(params)  # of the halves, which the schedules begin with
    for g, result in zip(grads, updates, strict=True):
        expected, state = update(g, state, params)
        assert_close(result, expected)
        numbers = {name: jnp.asarray(value) for name, value in case.values().items()}
        state = state._replace(hyperparams=numbers)


# --- schedules of the optimizers


@each([case for case in CASES if "learning_rate" in case.kwargs and "(" not in case.name])
def test_the_learning_rate_may_be_a_schedule(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 3)
    constant, _ = steps_of(transformation, params, grads, update)
    scheduled = case.build(learning_rate=lambda count: 0.1 / (1 + count))
    updates, state = steps_of(scheduled, params, grads)
    for count, (result, expected) in enumerate(zip(updates, constant, strict=True)):
        assert_close(result, jax.tree.map(lambda x, count=count: x / (1 + count), expected))
    assert types_of(state) == types_of(scheduled.init(params))


@each([case for case in CASES if "weight_decay" in case.kwargs])
def test_the_weight_decay_may_be_a_schedule(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 3)
    constant, _ = steps_of(transformation, params, grads, update)
    scheduled = case.build(weight_decay=lambda count: 0.5 / (1 + count))
    updates, state = steps_of(scheduled, params, grads)
    decays = case.kwargs["mask"](params)
    for count, (result, expected) in enumerate(zip(updates, constant, strict=True)):
        change = 0.5 / (1 + count) - case.kwargs["weight_decay"]
        decayed = jax.tree.map(
            lambda u, decays, p, change=change: u - decays * 0.1 * change * p,
            expected,
            decays,
            params,
        )
        assert_close(result, decayed)
    assert types_of(state) == types_of(scheduled.init(params))


# --- unusual leaves


@pytest.mark.parametrize("tree", [{}, [], (), {"a": None}, optax.MaskedNode()], ids=repr)
@every_case
def test_a_tree_without_arrays_passes(case, tree):
    transformation, _ = built(case.name)
    state = transformation.init(tree)
    updates, new_state = transformation.update(tree, state, tree)
    assert updates == tree
    assert types_of(new_state) == types_of(state)


@every_optimizer
def test_a_python_number_is_a_leaf_like_any_other(case):
    (transformation, _), params, (g,) = built(case.name), params_of(case), grads_of(case)
    expected = types_of(g)
    params["temperature"], g["temperature"] = 1.5, 0.5
    state = transformation.init(params)
    updates, new_state = jax.eval_shape(lambda: transformation.update(g, state, params))
    assert types_of(updates) == expected
    assert types_of(new_state) == types_of(state)


@every_case
def test_places_without_an_array_and_arrays_without_entries_pass_and_disturb_no_other(case):
    (transformation, update), params, grads = built(case.name), params_of(case), grads_of(case, 2)
    expected, _ = steps_of(transformation, params, grads, update)
    empty = {"no_rows": (0, 4), "no_columns": (4, 0)}
    empty |= {"bias": (0,)} if case.any_tree else {}
    for tree in (params, *grads, *expected):
        tree["empty"] = normal_tree(empty)
        tree["none"] = {"kernel": None, "bias": None}
        tree["masked"] = {"kernel": optax.MaskedNode()}
        tree["without"] = [{}, (), []]
    updates, state = steps_of(transformation, params, grads, update)
    assert_close(updates, expected)
    assert_finite(state)
    assert types_of(state) == types_of(transformation.init(params))
