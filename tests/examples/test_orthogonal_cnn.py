"""The CNN example: what the penalty does to the operators, and whether it measures truly."""

import dataclasses
import json

import jax
import numpy as np
import orthogonal_cnn as example
import pytest
from flax import nnx

# Measures of the smoke run, so that both share their compiled functions.
OPTIONS = dataclasses.replace(
    example.Options(), **example.SMOKE | {"steps": 200, "budgets": (0.25, 0.5)}, progress=False
)
RATE, STRENGTHS = 1.6e-2, (0.0, 1.0)


@pytest.fixture(scope="module")
def splits():
    return example.load_splits()


@pytest.fixture(scope="module")
def runs(splits):
    """Parameters and readings by strength, of one seed."""
    return {s: example.train(OPTIONS, splits[0], s, RATE, seed=0) for s in STRENGTHS}


@pytest.fixture(scope="module")
def measured(runs, splits):
    return {s: example.measure(params, splits[2], OPTIONS) for s, (params, _) in runs.items()}


def explicit_matrix(params, i, size):
    """A convolution's matrix in float64, from the layer's answers to unit images; no bias."""
    layer = nnx.merge(nnx.graphdef(example.ABSTRACT), params).convolutions[i]
    layer.bias, layer.use_bias = None, False
    inputs = size**2 * example.LAYERS[i].inputs
    images = np.eye(inputs, dtype=np.float32).reshape(inputs, size, size, -1)
    return np.asarray(layer(images), np.float64).reshape(inputs, -1).T


def gram(matrix):
    """The smaller one of the two."""
    return matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix


def test_the_splits_share_no_image_and_have_all_classes(splits):
    assert [len(split.labels) for split in splits] == [997, 300, 500]
    images = np.concatenate([np.asarray(split.images) for split in splits])
    assert len({image.tobytes() for image in images}) == 1797
    assert images.min() == 0 and images.max() == 1
    for split in splits:
        assert np.bincount(split.labels, minlength=10).min() > 0.09 * len(split.labels)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_loss_falls_at_every_strength(runs, measured, splits, strength):
    start = example.loss_of(example.init_params(0), *splits[2])
    assert example.loss_of(runs[strength][0], *splits[2]) < start / 10
    assert measured[strength]["clean"] > 0.93


def test_the_penalty_makes_the_operators_nearly_orthogonal(measured):
    free, held = measured[0.0], measured[1.0]
    assert np.all(np.divide(free["penalties"], held["penalties"]) > 30)
    spreads = {s: np.subtract(m["largest"], m["smallest"]) for s, m in measured.items()}
    assert np.all(spreads[0.0] > 5 * spreads[1.0])
    assert held["lipschitz_bound"] < 2 < 20 < free["lipschitz_bound"]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_lipschitz_constants_are_norms_of_explicit_matrices(runs, measured, strength):
    params, found = runs[strength][0], measured[strength]
    matrices = [explicit_matrix(params, i, x.size) for i, x in enumerate(example.LAYERS)]
    matrices.append(np.asarray(params["linear"]["kernel"], np.float64))
    squares = [np.linalg.eigvalsh(gram(matrix)) for matrix in matrices]
    largest = np.sqrt([values[-1] for values in squares])
    np.testing.assert_allclose(found["largest"], largest, rtol=1e-5)
    np.testing.assert_allclose(found["lipschitz_bound"], np.prod(largest), rtol=1e-5)
    smallest = np.sqrt([values[0] for values in squares])
    np.testing.assert_allclose(found["smallest"], smallest, rtol=1e-4)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_penalty_has_the_stride_of_its_layer(runs, measured, strength):
    params = runs[strength][0]
    for i, layer in enumerate(example.LAYERS):
        product = gram(explicit_matrix(params, i, size=6))
        expected = np.sum((product - np.eye(len(product))) ** 2) / (6 // layer.stride) ** 2
        assert measured[strength]["penalties"][i] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_the_attack_keeps_its_budget_and_raises_the_loss(runs, splits, budget):
    params, report = runs[0.0][0], splits[2]
    moved = example.attack(params, report, budget, OPTIONS.attack_steps)
    lengths = np.linalg.norm((moved - report.images).reshape(len(moved), -1), axis=1)
    assert lengths.max() <= budget * (1 + 1e-5)
    assert lengths.min() > budget / 2
    assert moved.min() >= 0 and moved.max() <= 1
    before = example.margins_of(params, *report)
    after = example.margins_of(params, moved, report.labels)
    assert np.mean(after < before) > 0.99
    loss = example.loss_of(params, *report)
    assert example.loss_of(params, moved, report.labels) > 3 * loss


def test_more_steps_and_more_budget_hurt_more(runs, measured, splits):
    report = splits[2]
    for strength, (params, _) in runs.items():
        found = measured[strength]
        assert found["clean"] > found["attack 0.25"] + 0.05 > found["attack 0.5"] + 0.2
        weak = example.attack(params, report, 0.5, 1)
        strong = example.attack(params, report, 0.5, OPTIONS.attack_steps)
        margins = [example.margins_of(params, x, report.labels).mean() for x in (weak, strong)]
        assert margins[1] < margins[0]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_no_attack_succeeds_against_a_certified_image(runs, measured, splits, strength):
    params, report = runs[strength][0], splits[2]
    bound = measured[strength]["lipschitz_bound"]
    assert measured[strength]["largest_slope"] <= bound
    moved = example.attack(params, report, 0.25, OPTIONS.attack_steps)
    change = example.logits_of(params, moved) - example.logits_of(params, report.images)
    assert np.linalg.norm(change, axis=1).max() <= 0.25 * bound
    certified = example.margins_of(params, *report) > np.sqrt(2) * bound * 0.25
    assert certified.mean() == pytest.approx(measured[strength]["certified 0.25"])
    assert np.all(example.margins_of(params, moved, report.labels)[certified] > 0)
    assert (certified.mean() > 0.2) == (strength > 0)


def test_the_diagnostics_are_those_of_the_kernels(runs):
    kernels = example.kernels_of(example.init_params(0))
    for strength in STRENGTHS:
        readings = runs[strength][1]
        for kernel, found in zip(kernels, readings["matrix_error"][0], strict=True):
            w = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
            expected = np.linalg.norm(gram(w) - np.eye(min(w.shape)))
            assert found == pytest.approx(expected, rel=1e-4)
        ratios = np.array(readings["update_ratio"])
        assert ratios.shape == (OPTIONS.steps // OPTIONS.monitor_every, len(example.PATHS))
        assert ratios.min() > 0 and ratios[-1].max() < ratios[0].min()
    last = {s: runs[s][1]["matrix_error"][-1] for s in STRENGTHS}
    for i in (1, 3):  # rows: the kernel's columns are orthonormal if the operator's rows are
        assert last[1.0][i] < last[0.0][i] / 100


def test_the_smoke_run_prints_tables_and_writes_data_and_picture(tmp_path, capsys):
    options = example.Options(smoke=True, progress=False, output=tmp_path)
    lines = example.main(options)
    printed = capsys.readouterr().out
    assert [line.strength for line in lines] == list(example.SMOKE["strengths"])
    for name in (*example.NAMES, "certified 0.25", "L_orth", "Lipschitz bound"):
        assert f"| {name} " in printed
    assert printed.count("| True ") == len(example.LAYERS)
    data = json.loads((tmp_path / "orthogonal_cnn.json").read_text())
    assert data["options"]["steps"] == example.SMOKE["steps"]
    assert [len(run["report"]) for run in data["runs"]] == [2, 2]
    assert all(np.isfinite(jax.tree.leaves(run["report"])).all() for run in data["runs"])
    assert (tmp_path / "orthogonal_cnn.png").stat().st_size > 30_000
