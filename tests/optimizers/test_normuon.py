import functools

import jax
import numpy as np
import optax
import oracles
import paths
import pytest
from helpers import normal_tree
from paths import updates_of

import orthax
from orthax.linalg import coefficients, newton_schulz, polar_svd

# Flax kernels: an expanding layer has more neurons (columns) than inputs, "tall" in PyTorch.
SHAPES = {"expanding": (10, 24), "contracting": (24, 10)}

settings = {
    "orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    "shape_scale": orthax.scale_by_width(),
}
published = functools.partial(orthax.normuon, **settings)


def assert_follows(optimizer, oracle, shapes=SHAPES):
    grads = [normal_tree(shapes, seed) for seed in range(100, 105)]
    paths.assert_follows(optimizer, normal_tree(shapes, 0, 0.1), grads, oracle)


def log_normal_neurons(seed=0, shape=(64, 256)):
    """Gradient whose neurons differ in scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(shape[1]))
    return {"w": (rng.standard_normal(shape) * scale).astype(np.float32)}


# --- the published algorithm


@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"), [(0.5, 0.8, True), (0.9, 0.95, False), (0.9, 0.0, True)]
)
def test_it_follows_the_transcription(momentum, decay, nesterov):
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    assert_follows(
        published(0.05, momentum, decay, **options),
        lambda p, g: oracles.normuon(p, g, 0.05, momentum=momentum, decay=decay, **options),
    )


def test_the_default_moments_are_the_published_ones_also_for_scanned_stacks_of_layers():
    assert_follows(
        published(0.05, dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1)),
        lambda p, g: oracles.normuon(p, g, 0.05),
        shapes={"layers": (3, 6, 10), "layer": (6, 10)},
    )


def test_the_shape_scale_multiplies_the_normalised_direction_and_not_the_decay():
    factor = oracles.adam_rms_factor
    assert_follows(
        published(0.05, weight_decay=0.3, shape_scale=orthax.scale_by_adam_rms()),
        lambda p, g: oracles.normuon(p, g, 0.05, weight_decay=0.3, factor=factor),
    )


def test_the_measured_scale_is_the_one_of_the_paper():
    """0.2 sqrt(mn) / |O|_F: root mean square 0.2 times the learning rate, whatever the rank."""
    rng = np.random.default_rng(0)
    low_rank = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 16))
    optimizer = orthax.normuon(0.01, shape_scale=orthax.scale_to_rms())
    (updates,) = updates_of(
        optimizer, {"w": np.zeros((24, 16), np.float32)}, [{"w": low_rank.astype(np.float32)}]
    )
    assert np.sqrt((oracles.float64(updates["w"]) ** 2).mean()) == pytest.approx(0.002, rel=1e-5)


# --- beside Muon


def test_neurons_of_an_expanding_layer_move_alike_as_they_do_not_under_muon():
    params, g = {"w": np.zeros((64, 256), np.float32)}, log_normal_neurons()
    (muon,) = updates_of(orthax.muon(1.0, **settings), params, [g])
    (normuon,) = updates_of(published(1.0), params, [g])
    assert oracles.spread(muon["w"], -2) > 0.4
    assert oracles.spread(normuon["w"], -2) < 1e-5
    assert np.linalg.norm(normuon["w"] - muon["w"]) > 0.2 * np.linalg.norm(muon["w"])
    np.testing.assert_allclose(np.linalg.norm(normuon["w"]), np.linalg.norm(muon["w"]), rtol=1e-5)


def test_an_accurate_direction_with_no_more_neurons_than_inputs_is_left_to_muon():
    rng = np.random.default_rng(0)
    spectrum = np.linspace(0.3, 1.0, 16)
    shapes = [(16, 16), (40, 16)]
    g = [oracles.matrix_with_spectrum(rng, *shape, spectrum, np.float32) for shape in shapes]
    orthogonalizer = orthax.orthogonalize(newton_schulz, coefficients=coefficients.minimax(8, 1e-3))
    grads = [[scale * x for x in g] for scale in np.float32([1.0, 3.0, 0.5])]
    exact = [-0.2 * max(x.shape) ** 0.5 * oracles.polar(x) for x in g]
    for name in ("muon", "normuon"):
        optimizer = getattr(orthax, name)(1.0, orthogonalizer=orthogonalizer)
        for updates in updates_of(optimizer, g, grads):
            for actual, expected in zip(updates, exact, strict=True):
                assert oracles.relative_error(actual, expected) < 1e-3, name


def test_an_exact_direction_moves_every_matrix_by_a_fifth_of_the_learning_rate():
    optimizer = orthax.normuon(0.01, orthogonalizer=orthax.orthogonalize(polar_svd))
    grads = [normal_tree(SHAPES, seed) for seed in (1, 2, 3)]
    for updates in updates_of(optimizer, normal_tree(SHAPES), grads):
        for u in updates.values():
            rms = np.sqrt((oracles.float64(u) ** 2).mean())
            assert rms == pytest.approx(0.2 * 0.01, rel=1e-5)


def test_the_second_moment_takes_one_number_a_neuron():
    params = normal_tree(SHAPES)

    def sizes(optimizer):
        return sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.ndim)

    neurons = sum(shape[1] for shape in SHAPES.values())
    assert sizes(orthax.normuon(0.1)) - sizes(orthax.muon(0.1)) == neurons
