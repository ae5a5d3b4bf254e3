"""Warnings that point at the user's line."""

import pathlib
import sys
import warnings

import jax
import optax

_PACKAGES = tuple(
    str(pathlib.Path(str(module)).parent)
    for module in (pathlib.Path(__file__).parent, jax.__file__, optax.__file__)
)


def warn(message: str) -> None:
    """A `UserWarning` at the nearest line above that is not of orthax, optax or JAX."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level if frame is not None else 2)
