"""optax's own contract for contributed optimizers, with orthax's factories in its table.

The harness is a module of the optax wheel that generates its tests from a table when it is
imported. Here the same source runs once more, with our table in the place of its own.
"""

import ast
import collections
import inspect
import re
import unittest
import warnings

import jax
import pytest
from absl import flags
from optax.contrib import _common_test

import orthax

OPTIMIZERS = [
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": 1e-2},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name in ("muon", "normuon")
]


def harness(optimizers):
    """The harness's test class for a table of optimizers of orthax."""
    module = ast.parse(inspect.getsource(_common_test))
    names = [getattr(statement, "name", None) for statement in module.body]
    start = names.index("ContribTest")
    namespace = {"__name__": __name__}
    for body in (module.body[:start], module.body[start:]):
        code = compile(ast.Module(body, type_ignores=[]), _common_test.__file__, "exec")
        exec(code, namespace)
        for name, value in {
            "_MAIN_OPTIMIZERS_UNDER_TEST": tuple(optimizers),
            "_ALL_OPTIMIZERS_UNDER_TEST": tuple(optimizers),
            "_get_opt_factory": lambda name: getattr(orthax, name),
        }.items():
            assert name in namespace, f"optax's harness has no {name} any more"
            namespace[name] = value
    return namespace["ContribTest"]


class TestHarness(harness(OPTIMIZERS)):
    """Every generated test, for our optimizers; a skipped one fails."""

    @pytest.fixture(autouse=True)
    def as_in_optax(self, monkeypatch):
        single_device = "chex_skip_pmap_variant_if_single_device"  # optax 0.2.6 tests with chex
        if single_device in flags.FLAGS:
            monkeypatch.setattr(flags.FLAGS[single_device], "value", False)
        with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
            # Its params are tuples of arrays of one, two and three axes.
            warnings.filterwarnings("ignore", ".*leaves such as .* have no names", UserWarning)
            yield

    def _callTestMethod(self, method):
        try:
            super()._callTestMethod(method)
        except unittest.SkipTest as skipped:
            self.fail(f"skipped: {skipped}")


def generated(test_class, opt_name):
    """How often each test was generated for an optimizer, by its name without the arguments."""
    return collections.Counter(
        re.sub(r"\(.*\)|\d+$", "", name)
        for cls in test_class.__mro__
        for name, test in vars(cls).items()
        if name.startswith("test_") and f"(opt_name={opt_name!r}," in (test.__doc__ or "")
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["opt_name"])
def test_each_optimizer_gets_every_test_that_optax_generates_for_its_own(optimizer):
    expected = generated(_common_test.ContribTest, "adopt")
    assert len(expected) >= 7
    assert generated(TestHarness, optimizer["opt_name"]) == expected
