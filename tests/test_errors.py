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


TABLES = {
    "empty": (),
    "ragged": ((3.4445, -4.775, 2.0315), (1.5, -0.5)),
    "one row": (3.4445, -4.775, 2.0315),
    "pairs": ((1.5, -0.5),),
    "not finite": ((1.0, float("nan"), 0.0),),
    "a name": "muon",
    "none": None,
}


MATRIX_FUNCTIONS = [newton_schulz, gram_newton_schulz, zolotarev, polar, polar_svd]


# --- numbers


# --- leaves


# --- numbers out of range


COSH = {
    "scale_by_cosh_rms": orthax.scale_by_cosh_rms,
    "auon": functools.partial(orthax.auon, 0.1),
    "hybrid_auon": functools.partial(orthax.hybrid_auon, 0.1),
}


# --- low rank


TRACE = optax.trace(0.9)
LOW_RANK = {
    "low_rank": functools.partial(orthax.low_rank, TRACE),
    "trion": functools.partial(orthax.trion, 0.1),
    "dct_adamw": functools.partial(orthax.dct_adamw, 0.1),
}
every_low_rank = pytest.mark.parametrize("factory", LOW_RANK.values(), ids=LOW_RANK)
MATRIX = {"up": [jnp.ones((6, 16))]}


@pytest.mark.parametrize("rank", [1.0, np.float32(1)])
def test_one_as_a_fraction_is_the_whole_side(rank):
    state = orthax.low_rank(TRACE, rank).init(MATRIX)
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


BASES = ("dct", "dct3", "random", "hadamard", "columns", "svd", "subspace")


BUFFERS = {
    "low_rank": (functools.partial(orthax.low_rank, TRACE, 2, retain=0.5), "buffer_dtype"),
    "without a buffer": (functools.partial(orthax.low_rank, TRACE, 2), "buffer_dtype"),
    "trion": (functools.partial(orthax.trion, 0.1), "mu_dtype"),
    "dct_adamw": (functools.partial(orthax.dct_adamw, 0.1), "buffer_dtype"),
}
every_buffer = pytest.mark.parametrize(("factory", "argument"), BUFFERS.values(), ids=BUFFERS)


def test_a_side_without_a_hadamard_matrix_passes_where_nothing_is_projected():
    state = orthax.low_rank(TRACE, 6, basis="hadamard").init(MATRIX)
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


# Adafactor's moments have no entry for each coordinate; those of `flatten` are one vector.
FACTORED = optax.scale_by_factored_rms(min_dim_size_to_factor=2)


ADAM = {
    "scale_by_adam_per_index": orthax.scale_by_adam_per_index,
    "dct_adamw": functools.partial(orthax.dct_adamw, 0.1),
    "dct_adamw(global)": functools.partial(orthax.dct_adamw, 0.1, bias_correction="global"),
}
every_adam = pytest.mark.parametrize("factory", ADAM.values(), ids=ADAM)


# --- arguments of the wrong type


# --- params


@every_optimizer
@pytest.mark.parametrize("params", [PARAMS, {"bias": jnp.ones(4)}], ids=["matrix", "vector"])
@pytest.mark.parametrize("mask", [None, True], ids=["all", "masked"])
def test_decay_without_params_names_the_optimizer_and_the_argument(name, params, mask):
    optimizer = OPTIMIZERS[name](0.1, weight_decay=0.25, mask=mask)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=says(name, "weight_decay=0.25", "params")):
        optimizer.update(params, state)
