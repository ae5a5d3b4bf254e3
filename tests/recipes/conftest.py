"""Recipes are written as users write them, who let JAX broadcast axes that are missing."""

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
