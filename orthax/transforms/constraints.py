"""Constraints that hold exactly: after each update the weights lie on a manifold.

The last transformations of a chain, after the learning rate: they see the whole step, and change it
so that `params + updates` satisfies the constraint. `project_tangent` stands at its beginning.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from orthax.base import check
from orthax.base.each_matrix import ALL, NONE, each_matrix
from orthax.linalg.elementary import divided, frobenius_norm, wide
from orthax.linalg.polar_factor.nearest import nearest_orthogonal

_AXES = {"output": -2, "input": -1}


def keep_orthogonal(
    method: Callable[[jax.Array], jax.Array] = nearest_orthogonal,
) -> optax.GradientTransformation:
    r"""Keeps every matrix orthogonal: the update ends at the orthogonal matrix nearest to its aim.

    Columns stay orthonormal where a matrix is tall or square, rows where it is wide. With polar the
    retraction, the update is :math:`\mathrm{polar}(W + u) - W`. It goes last in the chain:

        optax.chain(project_tangent(), optax.sgd(0.1, momentum=0.9), keep_orthogonal())

    Other params are orthogonal after the first update, if `params + updates` has full rank.
    Reference: Absil et al., Optimization Algorithms on Matrix Manifolds, 2008, example 4.1.3.

    Args:
      method: The retraction, of matrices (..., m, n), commuting with transposition. The default
        takes Newton-Schulz steps until it is exact: one or two for updates of spectral norm up to
        0.02, six for 0.1, fewer for tangent ones; `orthax.linalg.polar_svd` decomposes.

    Returns:
      A stateless transformation; updates keep dtype, shape and sharding. The spectral norm of
      :math:`W^T W - I` stays below 1e-5 for float32 params and updates (2e-6 over 10,000 updates at
      768 x 768, benchmarks/penalties.py), without drift: each update starts where the last ended.
      In 16 bits, params and updates are rounded to these, and the constraint with them.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs params.

    Raises:
      ValueError: At `update`, without params or for a leaf of fewer than two axes.
      TypeError: If `method` is no function; at `update`, for an integer leaf.

    Example:
      >>> w = jnp.eye(2)
      >>> tx = optax.chain(optax.sgd(0.5), keep_orthogonal())
      >>> updates, _ = tx.update(jnp.array([[0.0, 2.0], [-2.0, 0.0]]), tx.init(w), w)
      >>> print((w + updates).round(3))
      [[ 0.707 -0.707]
       [ 0.707  0.707]]
    """
    check.function("keep_orthogonal: method", method)
    return _kept("keep_orthogonal", lambda aim, _: method(aim), share=ALL)


def project_tangent() -> optax.GradientTransformation:
    r"""Projects gradients onto the tangent space of the orthogonal matrices at the params.

    :math:`G - W \, \mathrm{sym}(W^T G)` for matrices with orthonormal columns, and :math:`G -
    \mathrm{sym}(G W^T) W` for wide ones with orthonormal rows: the Riemannian gradient. What it
    takes away leads off the manifold and would be undone by `keep_orthogonal`.
    Reference: Edelman, Arias and Smith, The Geometry of Algorithms with Orthogonality Constraints,
    1998, <https://arxiv.org/abs/physics/9806030>.

    Returns:
      A stateless transformation, an orthogonal projection; updates keep dtype, shape and sharding.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs params.

    Raises:
      ValueError: Without params or for fewer than two axes; TypeError: for an integer leaf.

    Example:
      >>> tx = project_tangent()
      >>> updates, _ = tx.update(jnp.array([[5.0, 1.0], [3.0, 5.0]]), tx.init(0), jnp.eye(2))
      >>> print(updates)
      [[ 0. -1.]
       [ 1.  0.]]
    """

    def projected(g: jax.Array, w: jax.Array) -> jax.Array:
        g, w = wide(g), wide(w)
        tall = w.shape[-2] > w.shape[-1]
        matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        inner = matmul(w.mT.conj(), g) if tall else matmul(g, w.mT.conj())
        normal = (inner + inner.mT.conj()) / 2
        return g - (matmul(w, normal) if tall else matmul(normal, w))

    return each_matrix("project_tangent", projected, needs_params=True)


def keep_unit_neurons(
    radius: jax.typing.ArrayLike = 1.0, axis: Literal["output", "input"] = "output"
) -> optax.GradientTransformation:
    r"""Keeps the weights of every neuron on a sphere: each column at the same length.

    Put it last in the chain, after the learning rate.
    Reference: Absil, Mahony and Sepulchre, 2008: the oblique manifold.

    Args:
      radius: Length of the weights of each neuron, more than 0.
      axis: "output": the columns of `x @ W`, incoming weights of a neuron. "input": the rows.

    Returns:
      A stateless transformation; a neuron that would become zero keeps its direction.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs params.

    Raises:
      ValueError: For a `radius` not in (0, inf), an unknown `axis`, no params, fewer than two axes.
      TypeError: If `radius` is no number; at `update`, for an integer leaf.

    Example:
      >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> tx = optax.chain(optax.sgd(1.0), keep_unit_neurons())
      >>> updates, _ = tx.update(jnp.array([[0.4, 0.0], [-0.8, -3.0]]), tx.init(w), w)
      >>> print((w + updates).round(3))
      [[0.6 0. ]
       [0.8 1. ]]
    """
    check.number("keep_unit_neurons: radius", radius, "(0, inf)")
    check.choice("keep_unit_neurons: axis", axis, tuple(_AXES))
    over = _AXES[axis]

    def normalized(x: jax.Array, like: jax.Array, radius: jax.typing.ArrayLike) -> jax.Array:
        return jnp.asarray(radius, x.dtype) * _unit_or(x, like, over)

    return _kept("keep_unit_neurons", normalized, (radius,))


def keep_norm(radius: jax.typing.ArrayLike | None = None) -> optax.GradientTransformation:
    r"""Keeps every matrix on a sphere: the update ends at the Frobenius norm it started from.

    The constraint of Hyperball optimizers, which need no weight decay. With their relative step:

        optax.chain(orthogonalize(), optax.scale_by_trust_ratio(), optax.sgd(0.02), keep_norm())

    (`optax.scale_by_trust_ratio` takes one norm of a whole leaf: in a stack of matrices of unequal
    norms, experts or scanned layers, its step is relative to the stack's norm, not to each one's.)

    Args:
      radius: The norm of each matrix, more than 0. None: that of the params when the update
        starts; rounding then makes it drift, by up to 6e-5 in 100,000 float32 updates.

    Returns:
      A stateless transformation; updates keep dtype, shape and sharding. A matrix that an update
      would make zero keeps its direction; with None, a zero matrix stays zero.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs params.

    Raises:
      ValueError: For a `radius` not in (0, inf), no params at `update`, or fewer than two axes.
      TypeError: If `radius` is no number; at `update`, for an integer leaf.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> tx = optax.chain(optax.sgd(1.0), keep_norm())
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 0.0]]), tx.init(w), w)
      >>> print(w + updates)
      [[0. 0.]
       [0. 5.]]
    """
    if radius is not None:
        check.number("keep_norm: radius", radius, "(0, inf)")

    def normalized(x: jax.Array, like: jax.Array, radius: Any) -> jax.Array:
        norm = _size(like, (-2, -1)) if radius is None else radius
        return jnp.asarray(norm, x.dtype) * _unit_or(x, like, (-2, -1))

    return _kept("keep_norm", normalized, (radius,))


def _kept(
    call: str, end: Callable[..., jax.Array], numbers: tuple[Any, ...] = (), share: float = NONE
) -> optax.GradientTransformation:
    """Updates to `end(aim, start, *numbers)`, where the updates that came lead to the aim."""

    def step(u: jax.Array, w: jax.Array, *numbers: Any) -> jax.Array:
        start = wide(w)
        return end(start + wide(u), start, *numbers) - start

    return each_matrix(call, step, share=share, needs_params=True, numbers=numbers)


def _size(x: jax.Array, axis: int | tuple[int, int]) -> jax.Array:
    """Norm along an axis or over the matrix, at any scale; keeps the axes."""
    if axis == -1:
        return frobenius_norm(x[..., None])[..., 0]
    if axis == -2:
        return frobenius_norm(x.mT[..., None])[..., 0].mT
    return frobenius_norm(x)


def _unit_or(x: jax.Array, otherwise: jax.Array, axis: int | tuple[int, int]) -> jax.Array:
    """`x` over its norm along an axis; `otherwise` over its own where that is zero."""
    size = _size(x, axis)
    chosen = jnp.where(size == 0, otherwise, x)
    size = jnp.where(size == 0, _size(otherwise, axis), size)
    return divided(chosen, size)
