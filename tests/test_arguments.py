"""Bad arguments are refused in the caller's words: call, argument, what came, what is accepted.

The table is in `argument_cases`.
"""

import re

import pytest
from argument_cases import CALLS, ROWS, run_of, struct

FAULTS: dict[str, str] = {}
"""Starts of the labels of rows that do not hold yet, and why."""


def marks(row):
    for start, reason in FAULTS.items():
        if row.label.startswith(start):
            return [pytest.mark.xfail(strict=True, reason=reason)]
    return []


@pytest.mark.parametrize("row", [pytest.param(r, id=r.label, marks=marks(r)) for r in ROWS])
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


def test_a_fault_is_that_of_a_row():
    assert [start for start in FAULTS if not any(r.label.startswith(start) for r in ROWS)] == []


ARGUMENTS = {
    f"{call.name}-{name}": (call, name, argument)
    for call in CALLS
    for name, argument in call.arguments.items()
}


@pytest.mark.parametrize("label", [label for label, (*_, a) in ARGUMENTS.items() if a.good])
def test_good_values_are_accepted_the_ends_of_an_interval_too(label):
    call, name, argument = ARGUMENTS[label]
    for value in argument.good:
        run_of(call, name)(value)


@pytest.mark.parametrize("label", [label for label, (*_, a) in ARGUMENTS.items() if a.traced])
def test_a_traced_number_is_accepted(label):
    call, name, _ = ARGUMENTS[label]
    run_of(call, name)(struct())
