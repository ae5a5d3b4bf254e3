import inspect

import optax
import pytest
from helpers import OPTIMIZERS, says

import orthax
from orthax.linalg import coefficients


def test_every_optimizer_has_its_name():
    # Everything of ours that is called with a learning rate.
    public = {name: getattr(orthax, name) for name in orthax.__all__}
    rated = {
        name: function
        for name, function in public.items()
        if callable(function) and "learning_rate" in inspect.signature(function).parameters
    }
    assert dict(orthax.OPTIMIZERS) == rated == OPTIMIZERS
    for name in rated:
        assert orthax.by_name(name) is rated[name]
        assert isinstance(orthax.by_name(name)(0.1), optax.GradientTransformation)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=says("by_name: name", "'muon'", "'trion'", "'adamw'")):
        orthax.by_name("adamw")
    with pytest.raises(ValueError, match=says("coefficients.by_name", "'deepseek_v4'", "'five'")):
        coefficients.by_name("five")


def test_tables_have_the_names_of_their_constants():
    tables = {
        name for name in coefficients.__all__ if isinstance(getattr(coefficients, name), tuple)
    }
    assert {name.upper() for name in coefficients.TABLES} == tables
    for name, table in coefficients.TABLES.items():
        assert coefficients.by_name(name) is table is getattr(coefficients, name.upper())
