"""Bad arguments are refused in the caller's words: call, argument, what came, what is accepted.

The table is in `argument_cases`.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from argument_cases import CALLS, LEAF, ROWS, TRANSFORMATIONS, run_of, struct

import orthax
import orthax.nn
from orthax import conv_penalties, diagnostics, linalg, penalties
from orthax.linalg import coefficients

LAYER = "orthax.nn.HouseholderLinear"


def each(calls, arguments, values=("",)):
    """Starts of labels."""
    return [f"{c}-{a}-{v}" for c in calls.split() for a in arguments.split() for v in values]


KNOWN = (
    (
        "names a part of itself as the call",
        each("normuon", "decay")
        + each("root", "quantile")
        + each("auon hybrid_auon", "gamma")
        + each("auon", "mode")
        + each("trion dct_adamw", "rank basis ranking update_every mu_dtype")
        + each("dct_adamw", "b1 b2 eps buffer_dtype")
        + each("trion dct_adamw", LEAF, ["float32[6, 16]"])
        + each("warm_spectral_norm", "vector", ["float32"])
        + each(f"{LAYER}.from_kernel", "rank")
        + each(f"{LAYER}.from_kernel", "kernel", ["complex64"]),
    ),
    ("is not checked", each("frobenius_norm normalize", "x") + each("normalize", "eps")),
    ("is not checked", each("scalar_map", "singular_values")),
    ("is not checked", each("PathRules.lookup", "path")),
    ("is not checked", each(LAYER, "use_bias dtype param_dtype reflector_init bias_init")),
    (
        "what is no array is not refused, or as one of a wrong shape",
        each(
            f"{LAYER}.from_kernel",
            "kernel bias",
            ["int32", "bool", "[[1.0, 2.0]]", "2.0", "np.float32", "'matrix'"],
        )
        + each(f"{LAYER}.from_kernel", "kernel", ["None"])
        + each(
            "spectral_norm warm_spectral_norm warm_spectral_restricted_isometry",
            "vector",
            ["int32", "bool", "[[1.0, 2.0]]", "2.0", "np.float32", "'matrix'"],
        ),
    ),
    (
        "the shape of a leaf is looked at before its kind",
        each(" ".join(TRANSFORMATIONS), LEAF, ["int32[4]", "1.0", "'kernel'"]),
    ),
    (
        "integers among the params are not refused",
        each(
            "keep_orthogonal project_tangent keep_unit_neurons keep_norm", LEAF, ["int32[3, 4] of"]
        ),
    ),
    (
        "says that complex numbers are accepted",
        each("householder_product householder_projector", "v", ["int32[4", "bool"])
        + each("householder_projector", "u", ["int32[4", "bool"])
        + each("householder_vectors", "q", ["int32[4", "bool"])
        + each("householder_factors", "w", ["int32[4", "bool"]),
    ),
    (
        "a value of the wrong kind is a ValueError, or accepted",
        each(
            "newton_schulz gram_newton_schulz scalar_map",
            "coefficients",
            ["'muon'", "None", "(('1'", "((True", "((1j"],
        )
        + each("gram_newton_schulz", "restarts", ["3", "'ab'", "(1.5", "(2.0", "(True", "(None"])
        + each(
            "convolution_matrix convolution_singular_values orthogonal_convolution_exists",
            "padding",
            ["None", "1.5", "2.0", "True", "[1.0", "[None", "[(0, 1.5)"],
        )
        + each(
            "convolution_matrix convolution_singular_values",
            "input_size strides dilation",
            ["'2'", "array(2.", "Array(1."],
        )
        + each("convolution_orthogonality", "strides dilation", ["'2'", "array(2.", "Array(1."])
        + each(
            "orthogonal_convolution_exists",
            "strides dilation input_size",
            ["'2'", "array(2.", "Array(1."],
        )
        + each("orthogonal_convolution_exists", "kernel_size", ["array(3."])
        + each("for_shape", "spectra", ["3", "'ab'"])
        + each(
            "for_shape",
            "spectra",
            [
                f"[array([1., 1., 1.]), {x}"
                for x in ("'ab'", "None", "array([1.+", "['a']", "[True")
            ],
        )
        + each("PathRules", "rules", ["'ab'", "('ab'"])
        + each("dct_matrix", "dtype", ["None", "complex64"])
        + each("clip_by_quantile", "quantile", ["array('0.5'"])
        + each("muon", "mu_dtype", ["Array("]),
    ),
    (
        "a WithMemory of no functions is accepted",
        each("add_penalty", "penalty", ["WithMemory"])
        + each("of_updates of_params", "measure", ["WithMemory(init=3"]),
    ),
    (
        "what the function makes is not checked",
        each("partition_matrices", "matrices rest", ["3 made", "None made"]),
    ),
    (
        "groups that are no integer are a ValueError for a transposed layer",
        each("convolution_orthogonality", "groups", ["'2' t", "2.0 t", "None t"]),
    ),
    (
        "an empty interval is an AssertionError",
        each("top_columns householder_factors", "rank", ["1 empty"]),
    ),
    (
        "an array is a tracer where it is used",
        each("normalize newton_schulz gram_newton_schulz", "eps", ["an array"])
        + each("zolotarev", "lower", ["an array"])
        + each("minimax", "cushion safety", ["an array"]),
    ),
)
FAULTS = {start: reason for reason, starts in KNOWN for start in starts}
"""Starts of the labels of rows that do not hold yet, and why."""

UNCHECKED = {
    "AddPenaltyState": "what a transformation keeps; users read it",
    "LowRankState": "the same",
    "NormalizeNeuronsState": "the same",
    "ScaleByAdamPerIndexState": "the same",
    "SpectralNorm": "a result",
    "MatrixView": "made for `explain` and from dimension numbers, which are checked",
    "MatrixView.move": "the same",
    "MatrixView.move_back": "the same",
    "MatrixView.moved_spec": "the same",
    "Packed": "checked with the leaf that it is for, see `as_matrices`",
    "WithMemory": "checked by what takes it, see `add_penalty`",
    "PathRules-default": "any value",
    "explain-params": "any tree",
    "orthax.nn.HouseholderLinear-rngs": "what Flax takes",
    "mask": "what `optax.masked` takes",
    "precision": "what `jax.numpy.matmul` takes",
}
"""Calls, arguments of a call or of any that are not in the table, and why."""


@pytest.fixture(autouse=True, scope="module")
def whole_tracebacks():
    """JAX takes twice as long to shorten the traceback of an error as all else takes here."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def marks(label):
    for start, reason in FAULTS.items():
        if label.startswith(start):
            return [pytest.mark.xfail(strict=True, reason=reason)]
    return []


def labelled(label, *values):
    return pytest.param(*values, id=label, marks=marks(label))


@pytest.mark.parametrize("row", [labelled(row.label, row) for row in ROWS])
def test_a_bad_argument_is_refused_by_name(row):
    with pytest.raises((TypeError, ValueError)) as caught:
        row.run(row.bad.value)
    message = str(caught.value)
    assert type(caught.value) is row.bad.kind, message
    call, colon, rest = message.partition(": ")
    assert call + colon == f"{row.call}: ", message
    assert re.search(rf"(?<!\w){re.escape(row.bad.named or row.argument)}(?!\w)", rest), message
    for word in row.bad.words:
        assert word in rest, message


ARGUMENTS = [
    (f"{call.name}-{name}", call, name, argument)
    for call in CALLS
    for name, argument in call.arguments.items()
]


@pytest.mark.parametrize(
    ("call", "name", "argument"), [pytest.param(*rest, id=label) for label, *rest in ARGUMENTS]
)
def test_good_values_are_accepted_the_ends_of_an_interval_too(call, name, argument):
    for value in argument.good:
        run_of(call, name)(value)


@pytest.mark.parametrize(
    ("call", "name"),
    [pytest.param(call, name, id=label) for label, call, name, a in ARGUMENTS if a.traced],
)
def test_a_traced_number_is_accepted(call, name):
    run_of(call, name)(struct())


STATIC = {f"{label}-an array": (call, name) for label, call, name, a in ARGUMENTS if a.static}


@pytest.mark.parametrize(("call", "name"), [labelled(label, *STATIC[label]) for label in STATIC])
def test_a_number_that_must_be_known_may_be_an_array_even_while_tracing(call, name):
    inside, *_ = call.arguments[name].good
    run_of(call, name)(jnp.float32(inside))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=call.name)
        for call in CALLS
        if call.function.__module__.startswith(("orthax.transforms", "orthax.optimizers"))
        and any(argument.traced for argument in call.arguments.values())
    ],
)
def test_injected_numbers_are_accepted(call):
    numbers = {name: a.good[0] for name, a in call.arguments.items() if a.traced}
    static = set(inspect.signature(call.function).parameters) - set(numbers)
    injected = optax.inject_hyperparams(call.function, static_args=static)
    transformation = injected(**{**call.good, **numbers})
    state = transformation.init({})
    assert set(state.hyperparams) == set(numbers)
    jax.eval_shape(lambda state: transformation.update({}, state, {}), state)


def public_calls():
    """What a message calls it, and the call: functions, classes and their methods."""
    modules = (orthax, linalg, coefficients, penalties, conv_penalties, diagnostics, orthax.nn)
    for module in modules:
        prefix = "orthax.nn." if module is orthax.nn else ""
        for name in module.__all__:
            value = getattr(module, name)
            if not (callable(value) and value.__module__.startswith("orthax")):
                continue
            yield prefix + name, value
            for method in vars(value) if isinstance(value, type) else ():
                bound = getattr(value, method)
                if not method.startswith("_") and inspect.isroutine(bound):
                    yield f"{prefix}{name}.{method}", bound


PUBLIC = dict(public_calls())


def arguments_of(call):
    value = PUBLIC[call]
    parameters = inspect.signature(value).parameters
    if "kwargs" in parameters:  # of a metaclass
        parameters = inspect.signature(value.__init__).parameters
    return [name for name in parameters if name != "self"]


@pytest.mark.parametrize("call", PUBLIC)
def test_every_argument_of_a_public_call_is_in_the_table(call):
    if call in UNCHECKED:
        return
    rows = {row.argument for row in ROWS if row.call == call}
    left_out = {name for name in arguments_of(call) if {name, f"{call}-{name}"} & set(UNCHECKED)}
    assert rows.isdisjoint(left_out)
    assert [name for name in arguments_of(call) if name not in rows | left_out] == []


def test_what_is_left_out_of_the_table_exists_and_so_does_every_fault():
    names = {f"{call}-{name}" for call in PUBLIC for name in arguments_of(call)}
    known = names | set(PUBLIC) | {name.rpartition("-")[2] for name in names}
    assert [name for name in UNCHECKED if name not in known] == []
    labels = [*STATIC, *(row.label for row in ROWS)]
    assert [start for start in FAULTS if not any(x.startswith(start) for x in labels)] == []
