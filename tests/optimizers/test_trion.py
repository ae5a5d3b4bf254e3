import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import paths
import pytest
from helpers import array_bytes, normal_tree, says
from paths import updates_of

import orthax
from orthax import LowRankState
from orthax.linalg import coefficients, newton_schulz, polar_svd

# Flax kernels (fan_in, fan_out); sizes that have Hadamard matrices.
SHAPES = {"expanding": (16, 24), "contracting": (24, 16), "square": (16, 16), "layers": (2, 8, 12)}
tree = functools.partial(normal_tree, SHAPES)

settings = {
    "orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    "dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1),
}
published = functools.partial(orthax.trion, **settings)


def bases_of(optimizer, params, basis):
    """The matrix of the columns to choose from, for each length; a random one from the state."""
    if basis != "random":
        return {n: oracles.basis_matrix(basis, n) for n in (8, 16)}
    is_low_rank = functools.partial(lambda kind, x: isinstance(x, kind), LowRankState)
    states = jax.tree.leaves(optimizer.init(params), is_leaf=is_low_rank)
    (state,) = filter(is_low_rank, states)
    return {len(matrix): oracles.float64(matrix) for matrix in jax.tree.leaves(state.bases)}


def transcribed(p, grads, *, bases, **options):
    basis = bases[min(p.shape[-2:])]
    oracle = functools.partial(oracles.trion, learning_rate=0.05, rank=5, basis=basis, **options)
    return paths.slice_by_slice(oracle, p, grads)


# --- the published algorithm


@pytest.mark.parametrize(
    ("basis", "ranking", "momentum", "update_every", "factor"),
    [
        *[(basis, "l2", 0.5, 2, "adam_rms") for basis in ("dct", "random", "hadamard")],
        ("dct", "l1", 0.9, 1, "width"),
        ("dct3", "l2", 0.0, 3, "width"),
    ],
)
def test_it_follows_the_transcription(basis, ranking, momentum, update_every, factor):
    options = {"ranking": ranking, "update_every": update_every, "weight_decay": 0.1}
    scale = {"adam_rms": orthax.scale_by_adam_rms(), "width": orthax.scale_by_width()}[factor]
    params, grads = tree(0, 0.1), [tree(seed) for seed in range(1, 6)]
    optimizer = published(0.05, 5, momentum, basis=basis, shape_scale=scale, **options)
    bases = bases_of(optimizer, params, basis)
    oracle = functools.partial(
        transcribed,
        bases=bases,
        momentum=momentum,
        factor=getattr(oracles, f"{factor}_factor"),
        **options,
    )
    paths.assert_follows(optimizer, params, grads, oracle)


def test_the_defaults_are_the_papers_with_l2_and_adams_rms():
    params, grads = tree(0), [tree(seed) for seed in (1, 2)]
    options = {"dimension_numbers": settings["dimension_numbers"]}
    by_hand = orthax.trion(
        0.1,
        0.25,
        0.95,
        basis="dct",
        ranking="l2",
        update_every=1,
        weight_decay=0.0,
        orthogonalizer=orthax.orthogonalize(),
        shape_scale=orthax.scale_by_adam_rms(),
        **options,
    )
    ours, theirs = (updates_of(tx, params, grads) for tx in (orthax.trion(0.1, **options), by_hand))
    for actual, expected in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- beside Muon


@pytest.mark.parametrize("rank", [16, 1000, 1.0, lambda m, n: max(m, n)])
def test_at_full_rank_it_is_muon_without_nesterov(rank):
    params, grads = tree(0), [tree(seed) for seed in (1, 2, 3)]
    options = {**settings, "weight_decay": 0.1}
    scale = orthax.scale_by_adam_rms()
    ours = updates_of(published(0.1, rank, shape_scale=scale, weight_decay=0.1), params, grads)
    theirs = updates_of(
        orthax.muon(0.1, nesterov=False, shape_scale=scale, **options), params, grads
    )
    for actual, expected in zip(ours, theirs, strict=True):
        for leaf in params:
            assert oracles.relative_error(actual[leaf], expected[leaf]) < 1e-5, leaf


@pytest.mark.parametrize("rank", [2, 8])
def test_an_update_has_the_rms_of_adams_times_the_root_of_the_part_of_the_rank(rank):
    params, grads = tree(0), [tree(seed) for seed in (1, 2)]
    optimizer = orthax.trion(
        0.1,
        rank,
        orthogonalizer=orthax.orthogonalize(polar_svd),
        dimension_numbers=settings["dimension_numbers"],
    )
    for updates in updates_of(optimizer, params, grads):
        for leaf, u in updates.items():
            rms = np.sqrt((oracles.float64(u) ** 2).mean())
            expected = 0.1 * 0.2 * (rank / min(u.shape[-2:])) ** 0.5
            np.testing.assert_allclose(rms, expected, rtol=0.02, err_msg=leaf)


# --- the state


@pytest.mark.parametrize("basis", ["dct", "dct3", "hadamard", "columns"])
def test_the_state_is_the_momentum_and_an_index_for_each_dimension(basis):
    params = tree(0)
    state = jax.eval_shape(published(0.1, 3, basis=basis).init, params)
    matrices = {leaf: int(np.prod(shape[:-2])) for leaf, shape in SHAPES.items()}
    momentum = sum(p.nbytes for p in params.values())
    assert array_bytes(state) == momentum + 4 * 3 * sum(matrices.values())
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(state) if not x.ndim)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_momentum_in_few_bits_takes_so_many_and_two_numbers_a_row(bits):
    params = tree(0)
    state = jax.eval_shape(published(0.1, 3, mu_dtype=f"int{bits}").init, params)
    rows = {leaf: int(np.prod(shape[:-1])) for leaf, shape in SHAPES.items()}
    codes = sum(rows[leaf] * -(-shape[-1] * bits // 8) for leaf, shape in SHAPES.items())
    indices = 4 * 3 * sum(int(np.prod(shape[:-2])) for shape in SHAPES.values())
    assert array_bytes(state) == codes + 8 * sum(rows.values()) + indices
    whole = array_bytes(jax.eval_shape(published(0.1, 3).init, params))
    assert array_bytes(state) < {8: 0.75, 4: 0.6}[bits] * whole


@pytest.mark.parametrize("mu_dtype", [None, "int8", "int4"])
def test_a_least_squares_problem_is_solved_whatever_the_bits_of_the_momentum(mu_dtype):
    optimizer = published(optax.linear_schedule(0.3, 0.0, 150), 4, 0.8, mu_dtype=mu_dtype)
    assert paths.part_of_the_loss_left(optimizer, 150) < 0.02


def test_a_state_of_the_former_default_rank_is_refused_with_what_to_pass():
    params = {"dense": {"kernel": jnp.zeros((256, 300))}}
    state = orthax.trion(0.1, rank=128).init(params)
    with pytest.raises(ValueError, match=says("'dense/kernel'", "rank 128", "is now 64", "Pass")):
        orthax.trion(0.1).update(params, state, params)
