"""Bad arguments are refused in the caller's words: call, argument, what came, what is accepted.

The table is in `argument_cases`.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from argument_cases import CALLS, HAS_EQUINOX, ROWS, run_of, struct

import orthax
import orthax.nn
from orthax import conv_penalties, diagnostics, linalg, penalties
from orthax.linalg import coefficients

UNCHECKED = {
    "AddPenaltyState": "what a transformation keeps; users read it",
    "LowRankState": "the same",
    "NormalizeNeuronsState": "the same",
    "ScaleByAdamPerIndexState": "the same",
    "SpectralNorm": "a result",
    "MatrixView": "made for `explain` and from dimension numbers, which are checked",
    "Packed": "checked with the leaf that it is for, see `as_matrices`",
    "WithMemory": "checked by what takes it, see `add_penalty`",
    "PathRules-default": "any value",
    "explain-params": "any tree",
    "from_optax_muon-state": "any; that of another optimizer is refused, see test_from_optax.py",
    "from_optax_muon-params": "any tree",
    "scalars": "any state; traced values are refused, see test_diagnostics.py",
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


def labelled(label, *values):
    return pytest.param(*values, id=label)


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
    for module in (*modules, *((orthax.eqx,) if HAS_EQUINOX else ())):
        prefix = f"{module.__name__}." if module.__name__ in ("orthax.nn", "orthax.eqx") else ""
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


def test_what_is_left_out_of_the_table_exists():
    names = {f"{call}-{name}" for call in PUBLIC for name in arguments_of(call)}
    known = names | set(PUBLIC) | {name.rpartition("-")[2] for name in names}
    assert [name for name in UNCHECKED if name not in known] == []
