"""Optimizers, and the oracles that stand for them, follow the published codes for six steps."""

import functools

import numpy as np
import optax
import oracles
import pytest
import tolerances
from helpers import GOLDEN
from paths import run

import orthax
from orthax.linalg import coefficients, newton_schulz

muon_table = {"orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON)}
width = {"shape_scale": orthax.scale_by_width()}
auon = {"gamma": 1.5, "shape_scale": optax.identity()}
auon_oracle = functools.partial(
    oracles.auon, learning_rate=0.24, gamma=1.5, mode="code", factor=lambda *_: 1.0
)


def trion(basis):
    """The published code chooses columns of the DCT-III for tall leaves and rows for wide ones."""
    options = {"basis": basis, "ranking": "l1", "weight_decay": 0.1}
    return orthax.trion(0.02, 8, 0.95, **options, **muon_table, **width)


def trion_oracle(p, grads, basis):
    basis = oracles.basis_matrix(basis, min(p.shape))
    options = {"ranking": "l1", "weight_decay": 0.1, "factor": oracles.width_factor}
    return oracles.trion(p, grads, 0.02, 8, basis=basis, **options)


# What the data are called, their leaves, the optimizer, and its oracle.
CODES = {
    "muon": (
        "muon",
        ("tall", "wide", "square"),
        orthax.muon(0.02, 0.95, weight_decay=0.1, **muon_table, **width),
        lambda p, grads: oracles.muon(p, grads, 0.02, weight_decay=0.1),
    ),
    "normuon": (
        "normuon",
        ("tall", "wide", "square"),
        orthax.normuon(0.02, 0.95, 0.95, weight_decay=0.1, **muon_table, **width),
        lambda p, grads: oracles.normuon(p, grads, 0.02, weight_decay=0.1),
    ),
    "root": (
        "root",
        ("tall", "wide", "square"),
        orthax.root(0.01, weight_decay=0.1, **muon_table),
        lambda p, grads: oracles.root(p, grads, 0.01, weight_decay=0.1),
    ),
    "auon": (
        "auon_code",
        ("tall", "wide", "square"),
        orthax.auon(0.24, 0.95, mode="code", weight_decay=0.01, **auon),
        functools.partial(auon_oracle, weight_decay=0.01),
    ),
    "hybrid_auon": (
        "hybrid_auon_code",
        ("tall", "wide", "square"),
        orthax.hybrid_auon(0.24, 0.95, weight_decay=0.0, **auon),
        functools.partial(auon_oracle, steps=1),
    ),
    "trion": (
        "trion_l1_kj",
        ("tall", "square"),
        trion("dct3"),
        functools.partial(trion_oracle, basis="dct3"),
    ),
    "trion of wide matrices": (
        "trion_l1_kj",
        ("wide",),
        trion("dct"),
        functools.partial(trion_oracle, basis="dct"),
    ),
}
every_code = pytest.mark.parametrize(
    ("name", "leaves", "optimizer", "oracle"), CODES.values(), ids=CODES
)


def published(name, leaves):
    """Parameters before the first gradient and after each, and gradients; kernels as in Flax."""
    with np.load(GOLDEN) as data:

        def tree(key):
            return {leaf: data[f"{name}/{key}/{leaf}"].T for leaf in leaves}

        return [tree(f"p{t}") for t in range(7)], [tree(f"g{t}") for t in range(6)]


@every_code
def test_an_optimizer_follows_the_published_code(name, leaves, optimizer, oracle):
    params, grads = published(name, leaves)
    for t, after in enumerate(run(optimizer, params[0], grads)):
        for leaf in leaves:
            step = np.abs(params[t + 1][leaf] - params[t][leaf]).max()
            error = np.abs(after[leaf] - params[t + 1][leaf]).max()
            assert error < tolerances.GOLDEN_STEP * step, (t, leaf)


@every_code
def test_its_oracle_does_too(name, leaves, optimizer, oracle):
    params, grads = published(name, leaves)
    for leaf in leaves:
        path = oracle(params[0][leaf], [g[leaf] for g in grads])
        for t, after in enumerate(path):
            step = np.abs(params[t + 1][leaf] - params[t][leaf]).max()
            assert np.abs(after - params[t + 1][leaf]).max() < 1e-4 * step, (t, leaf)
