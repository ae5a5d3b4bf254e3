"""The rank of low-rank optimizers: an integer, a fraction of the shorter side, or a function."""

import math
from typing import Any

import numpy as np

from orthax.base import check


def check_rank(call: str, rank: Any, *, injectable: bool = True) -> None:
    """Raises unless `rank` is an integer, a fraction or a function.

    Of a call whose arguments can be injected by optax, the error says how to leave this one out.
    """
    if callable(rank):
        return
    accepted = "an integer of at least 1, a fraction in (0, 1] or a function of (m, n)"
    if isinstance(rank, bool) or not isinstance(rank, (int, float, np.integer, np.floating)):
        hint = (
            " In optax.inject_hyperparams, list it in static_args: "
            f"optax.inject_hyperparams(orthax.{call}, static_args=('rank',))(...)."
        )
        raise TypeError(
            f"{call}: rank must be {accepted}, got {rank!r}.{hint if injectable else ''}"
        )
    if not (rank >= 1 if isinstance(rank, (int, np.integer)) else 0 < rank <= 1):
        raise ValueError(f"{call}: rank must be {accepted}, got {rank!r}.")


def rank_of(call: str, rank: Any, path: str, shape: tuple[int, ...]) -> int:
    """The rank that is asked for of matrices of a shape (..., m, n); it may exceed their own."""
    m, n = shape[-2:]
    if not callable(rank):
        whole = isinstance(rank, (int, np.integer))
        return int(rank) if whole else max(1, math.floor(float(rank) * min(m, n) + 0.5))
    return check.integer(f"{call}: rank({m}, {n}) of '{path}'", rank(m, n))
