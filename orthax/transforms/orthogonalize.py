"""`orthogonalize`: every matrix becomes its orthogonal polar factor, or an approximation of it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.each_matrix import ALL, NONE, each_matrix
from orthax.base.given_shardings import check_sharding
from orthax.linalg.polar_factor.choice import polar


def orthogonalize(
    method: Callable[..., jax.Array] = polar,
    *,
    stack: bool = True,
    sharding: Any = None,
    **options: Any,
) -> optax.GradientTransformation:
    r"""Replaces every matrix by its (approximate) orthogonal polar factor.

    The steepest descent direction under the spectral norm: singular values 1, the same vectors.
    Reference: Jordan et al., Muon, 2024, <https://kellerjordan.github.io/posts/muon/>; Bernstein
    and Newhouse, Old Optimizer, New Norm, 2024, <https://arxiv.org/abs/2409.20325>.

    Args:
      method: Function of matrices (..., m, n) to such of the same shape and dtype; with `stack` it
        must commute with transposition, as every polar factor does. The default chooses by shape,
        dtype and platform; `orthogonalize(accuracy="exact")` is nearer to the factor, and slower.
      stack: Whether matrices of one dtype and shape, up to transposition, are stacked, `method`
        called once per shape: smaller programs, faster to compile.
      sharding: On a mesh each matrix travels to one device and back. None: how leaves are cut is
        read from their types or, on Auto axes under `jax.jit`, left to the compiler. A tree of
        shardings or `PartitionSpec`s like the updates, or a function of updates to one, tells it
        there, for the fewest exchanges; a wrong one costs time and changes no value. False: leaves
        stay where they are and the compiler divides products. Optimizers take it as well.
      **options: Passed to `method`: `orthogonalize(newton_schulz, coefficients=MUON)`.

    Returns:
      A stateless transformation; updates keep shape, dtype and sharding, on Auto and Explicit
      meshes, and are those of one device.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      TypeError: At construction, for an option that `method` lacks; at `update`, for an integer
        leaf; ValueError: at `update`, for a leaf of fewer than two axes, or what `method` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.linalg import polar_svd
      >>> tx = orthogonalize(polar_svd)
      >>> updates, _ = tx.update({"w": jnp.array([[0.0, 3.0], [2.0, 0.0]])}, tx.init({}))
      >>> print(abs(updates["w"]).round(3))
      [[0. 1.]
       [1. 0.]]
    """
    check.function("orthogonalize: method", method)
    check.flag("orthogonalize: stack", stack)
    _check_options(method, options)
    check_sharding("orthogonalize", sharding)
    configured = functools.partial(method, **options) if options else method
    return each_matrix(
        "orthogonalize",
        configured,
        share=ALL if stack else NONE,
        whole=sharding is not False,
        sharding=sharding,
    )


def _check_options(method: Callable[..., jax.Array], options: dict[str, Any]) -> None:
    name = getattr(method, "__name__", repr(method))
    try:
        parameters = inspect.signature(method).parameters.values()
    except ValueError:  # a builtin without a signature
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL][1:]
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise TypeError(f"orthogonalize: {name} has no option {option!r}; it has {has}.")
