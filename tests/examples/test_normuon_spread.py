"""What NorMuon is for, seen on a GPT that is really trained: neurons take steps of even size."""

import dataclasses

import gpt
import jax
import numpy as np
import optax
import pytest

import orthax

CONFIG = gpt.settle(
    dataclasses.replace(gpt.Config(optimizer="muon", progress=False), **gpt.SMOKE, seed=3)
)


def trained_updates(optimizer, steps=40):
    """The last update of the first MLP kernels, (32, 128): four times more neurons than inputs."""
    corpus = gpt.read_corpus(None)
    batches = gpt.make_batches(corpus, CONFIG)
    graphdef, (params, _) = gpt.init_state(CONFIG)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, tokens):
        gradients = jax.grad(gpt.loss_of)(params, graphdef, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, updates

    for index in range(steps):
        params, state, updates = step(params, state, batches[index])
    return [np.asarray(block["up"]["kernel"], np.float64) for block in updates["blocks"].values()]


def spread_of_neuron_norms(update):
    norms = np.linalg.norm(update, axis=0)
    return norms.std() / norms.mean()


@pytest.fixture(scope="module")
def updates():
    return {
        "muon": trained_updates(orthax.muon(4e-3)),
        "normuon": trained_updates(orthax.normuon(4e-3)),
    }


def test_the_spread_of_neuron_norms_falls_to_a_third_of_muons(updates):
    for muon, normuon in zip(updates["muon"], updates["normuon"], strict=True):
        assert muon.shape == (32, 128)
        assert spread_of_neuron_norms(muon) > 0.1
        assert spread_of_neuron_norms(normuon) < spread_of_neuron_norms(muon) / 3


def test_the_size_of_a_whole_update_stays_that_of_muon(updates):
    for muon, normuon in zip(updates["muon"], updates["normuon"], strict=True):
        assert np.linalg.norm(normuon) == pytest.approx(np.linalg.norm(muon), rel=0.1)
