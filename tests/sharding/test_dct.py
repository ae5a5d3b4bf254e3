"""Cosine transforms on eight devices are those on one; by product they move nothing."""

import re

import jax
import numpy as np
import oracles
import pytest
import scipy.fft
import tolerances
from helpers import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthax.linalg import dct, idct

COLLECTIVE = re.compile("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
LENGTH = 264  # on CPU "auto" takes the FFT
LAYOUTS = {
    "rows": ((16, LENGTH), P("x", None)),
    "rows_over_all": ((16, LENGTH), P(("x", "y"), None)),
    "batch": ((4, 3, LENGTH), P("x", None, None)),
    "batch_and_rows": ((4, 6, LENGTH), P("x", "y", None)),
}
ORACLES = {dct: scipy.fft.dct, idct: scipy.fft.idct}

by_layout = pytest.mark.parametrize(("shape", "spec"), LAYOUTS.values(), ids=LAYOUTS)
by_function = pytest.mark.parametrize("function", ORACLES, ids=["dct", "idct"])


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    assert jax.device_count() == 8, "run `pytest tests/sharding` by itself"
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)


@by_layout
@by_function
def test_auto_chooses_as_on_one_device(function, shape, spec, mesh):
    x = normal(shape)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    compiled = jax.jit(function)
    assert "fft" in compiled.lower(sharded).as_text()
    np.testing.assert_allclose(compiled(sharded), compiled(x), rtol=0, atol=1e-6 * np.abs(x).max())


@by_layout
@by_function
def test_products_over_other_axes_need_no_collectives(function, shape, spec, mesh):
    x = jax.device_put(normal(shape), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: function(x, method="matrix")).lower(x).compile()
    actual, text = program(x), program.as_text()
    assert COLLECTIVE.findall(text) == []
    assert actual.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert jax.typeof(actual).sharding == jax.typeof(x).sharding
    expected = ORACLES[function](oracles.float64(x), norm="ortho", axis=-1)
    limit = tolerances.rounding(np.float32, gain=np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)
