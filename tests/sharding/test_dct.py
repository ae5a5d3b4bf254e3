"""Cosine transforms by product move nothing between devices; "auto" chooses the product there."""

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
LENGTH = 264  # one device would take the FFT
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
def test_auto_takes_products_over_other_axes_which_need_no_collectives(function, shape, spec, mesh):
    x = jax.device_put(normal(shape), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: function(x, method="auto")).lower(x).compile()
    actual, text = program(x), program.as_text()
    assert COLLECTIVE.findall(text) == []
    assert "fft" not in text
    assert actual.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert jax.typeof(actual).sharding == jax.typeof(x).sharding
    expected = ORACLES[function](oracles.float64(x), norm="ortho", axis=-1)
    limit = tolerances.rounding(np.float32, gain=np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def test_an_fft_is_gathered():
    """Why "auto" multiplies on a mesh; when this fails, an FFT could be chosen there too."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(normal((16, LENGTH)), NamedSharding(mesh, P("x", None)))
    text = jax.jit(lambda x: dct(x, method="fft")).lower(x).compile().as_text()
    assert "all-gather" in COLLECTIVE.findall(text)
