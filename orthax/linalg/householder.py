r"""Orthogonal matrices as products of Householder reflections, in compact WY form.

A reflection :math:`H = I - 2 v v^T / \|v\|^2` depends on the direction of v only, so any optimizer
may move v: the product stays orthogonal. :math:`H_1 H_2 \cdots H_r = I - V T^{-1} V^T` with
:math:`T = \mathrm{triu}(V^T V, 1) + \mathrm{diag}(\|v_i\|^2) / 2` takes a solve and two products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from orthax.base import check
from orthax.base.leaves import check_matrices
from orthax.linalg.elementary import (
    constant_unit_max,
    frobenius_norm,
    unit_max,
    weighted_hypot,
)


def householder_product(v: jax.Array, columns: int | None = None) -> jax.Array:
    r"""Product of Householder reflections, :math:`H_1 H_2 \cdots H_r`, or its first columns.

    Args:
      v: Directions as columns, (..., n, r), r <= n, real floating; a zero column reflects nothing.
      columns: How many columns of the product to compute, 1 to n. None: all n.

    Returns:
      Shape (..., n, columns), dtype of `v`; 16-bit input is computed in float32. Columns are
      orthonormal for any `v`: in float32, entries of :math:`Q^T Q - I` are below 1e-6 for random
      directions up to n = r = 1024, and 3e-5 for hundreds of nearly parallel ones. The whole
      product's determinant is :math:`(-1)^r`, zero columns not counted. The gradient at those is 0.

    Raises:
      ValueError: If `v` has fewer than two axes or more columns than rows, or `columns` is not
        within 1 and n; TypeError: if `v` is not real floating, or `columns` no integer.

    Example:
      >>> print(householder_product(jnp.array([[1.0], [1.0]])).round(6) + 0.0)
      [[ 0. -1.]
       [-1.  0.]]

    Reference: Joffrain et al., Accumulating Householder Transformations, Revisited, 2006,
      <https://doi.org/10.1145/1141885.1141886>.
    """
    call = "householder_product"
    v = _check_tall(call, "v", v)
    n = v.shape[-2]
    columns = n if columns is None else check.integer(f"{call}: columns", columns, f"[1, {n}]")
    # I - Y T^-1 Y^T with T = triu(Y^T Y, 1) + diag(|y_i|^2) / 2, the UT form of Joffrain et al. For
    # unit columns the diagonal is 1/2. A zero column is one of T without neighbours: the half keeps
    # T invertible, and Y removes what the solve gives for it.
    y = _unit_columns(v)
    products = jnp.matmul(y.mT, y, precision=lax.Precision.HIGHEST)
    half = jnp.broadcast_to(jnp.eye(v.shape[-1], dtype=y.dtype) / 2, products.shape)
    # T^-1 Y^T, of the wanted columns only: the solve is the one part that is not a product.
    solved = lax.linalg.triangular_solve(
        jnp.triu(products, 1) + half, y[..., :columns, :].mT, left_side=True, lower=False
    )
    moved = jnp.matmul(y, solved, precision=lax.Precision.HIGHEST)
    identity = jnp.broadcast_to(jnp.eye(n, columns, dtype=y.dtype), moved.shape)
    return (identity - moved).astype(v.dtype)


def householder_vectors(q: jax.Array) -> jax.Array:
    r"""Directions of reflections whose product begins with the given orthonormal columns.

    Undoes `householder_product`: `householder_product(v, k)` with the v returned is q. Every
    orthogonal matrix has such a product, also of determinant 1, as a direction may come out zero.
    Reference: Golub and Van Loan, Matrix Computations, 4th edition, 2013, algorithm 5.1.1.

    Args:
      q: Orthonormal columns, shape (..., n, k) with k <= n, real floating.

    Returns:
      Shape (..., n, k), dtype of `q`: unit columns, or zero, with zeros above the diagonal. For
      columns that are not orthonormal, those of the Q factor for a positive diagonal of R. k steps.

    Raises:
      ValueError: If `q` has fewer than two axes or is wide; TypeError: if `q` is not real floating.

    Example:
      >>> rotation = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> print(householder_product(householder_vectors(rotation)).round(6) + 0.0)
      [[ 0. -1.]
       [ 1.  0.]]
    """
    q = _check_tall("householder_vectors", "q", q)
    if q.size == 0:
        return q
    a, _ = unit_max(q)

    # Householder's QR factorisation: step j reflects column j onto the positive axis j. The sign of
    # LAPACK, against cancellation, would give R negative entries and the product wrong signs.
    def reflect(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, vectors = carry
        column = lax.dynamic_index_in_dim(a, j, axis=-1)
        row = lax.broadcasted_iota(j.dtype, column.shape, column.ndim - 2)
        below = jnp.where(row > j, column, 0)
        head = lax.dynamic_index_in_dim(column, j, axis=-2)
        tail = frobenius_norm(below)
        length = weighted_hypot(head, tail)
        # head - length without cancellation: -tail^2 / (head + length) where head is positive
        # (algorithm 5.1.1). A column on its positive axis gives zero and is not reflected; without
        # that, every product of k reflections would have the determinant (-1)^k.
        divisor = jnp.where(head > 0, head + length, 1)
        first = jnp.where(head > 0, -tail * (tail / divisor), head - length)
        v = _unit_columns(jnp.where(row == j, first, below))
        inner = jnp.matmul(v.mT, a, precision=lax.Precision.HIGHEST)
        return a - 2 * v * inner, lax.dynamic_update_index_in_dim(vectors, v, j, axis=-1)

    _, vectors = lax.fori_loop(0, q.shape[-1], reflect, (a, jnp.zeros_like(a)))
    return vectors.astype(q.dtype)


def householder_projector(u: jax.Array, v: jax.Array) -> jax.Array:
    r"""Matrix of rank k whose k singular values are all 1: the low-rank orthogonal projector.

    :math:`Q(u) \, S \, Q(v)^T` with S having ones on the first k diagonal entries: it maps k
    directions of the input isometrically onto k of the output and the rest to zero.
    Reference: Song et al., Householder Projector for Unsupervised Latent Semantics Discovery, 2023,
    <https://arxiv.org/abs/2307.08012>.

    Args:
      u: Reflected directions on the side of the rows, shape (..., m, k).
      v: The same on the side of the columns, shape (..., n, k).

    Returns:
      Shape (..., m, n). As a Flax kernel, u belongs to the inputs and v to the outputs.

    Raises:
      ValueError: If either has fewer than two axes or more columns than rows, or their numbers of
        columns or batch axes differ; TypeError: if either is not real floating.

    Example:
      >>> u, v = jnp.zeros((2, 1)), jnp.array([[1.0], [1.0]])
      >>> print(householder_projector(u, v).round(6) + 0.0)
      [[ 0. -1.]
       [ 0.  0.]]
    """
    call = "householder_projector"
    u, v = _check_tall(call, "u", u), _check_tall(call, "v", v)
    if (*u.shape[:-2], u.shape[-1]) != (*v.shape[:-2], v.shape[-1]):
        equal = "equal batch axes and numbers of columns"
        raise ValueError(f"{call}: u and v must have {equal}, got shapes {u.shape} and {v.shape}.")
    if u.shape[-1] == 0:
        return jnp.zeros((*u.shape[:-1], v.shape[-2]), u.dtype)
    # S selects the first k columns of both products, so no others are computed.
    left, right = (householder_product(x, x.shape[-1]) for x in (u, v))
    return jnp.matmul(left, right.mT, precision=lax.Precision.HIGHEST)


def householder_factors(w: jax.Array, rank: int | None = None) -> tuple[jax.Array, jax.Array]:
    r"""The u and v whose `householder_projector` is nearest to a trained matrix.

    With the decomposition :math:`w = U S V^T` that projector is :math:`U_k V_k^T`: the leading k
    singular vectors stay, their singular values become 1, the others 0.

    Args:
      w: Matrices, shape (..., m, n), real floating.
      rank: k, from 1 to min(m, n). None: min(m, n).

    Returns:
      u of shape (..., m, k) and v of shape (..., n, k), dtype of `w`.

    Raises:
      ValueError: If `w` has fewer than two axes or `rank` is out of range.
      TypeError: If `w` is not real floating, or `rank` no integer. Gradients (`jnp.linalg.svd`'s)
        are not finite for equal singular values.

    Example:
      >>> u, v = householder_factors(jnp.array([[0.0, 5.0], [0.1, 0.0]]), rank=1)
      >>> print(householder_projector(u, v).round(5) + 0.0)
      [[0. 1.]
       [0. 0.]]
    """
    call = "householder_factors"
    w = check_matrices(call, w, "w", kind=jnp.floating)
    short = min(w.shape[-2:])
    rank = short if rank is None else check.integer(f"{call}: rank", rank, f"[1, {short}]")
    scaled, _ = unit_max(w)
    u, _, vh = jnp.linalg.svd(scaled, full_matrices=False)
    # householder_product(left, k) and (right, k) are the singular vectors, signs included.
    parts = u[..., :rank], vh[..., :rank, :].mT
    left, right = (householder_vectors(part).astype(w.dtype) for part in parts)
    return left, right


def _unit_columns(v: jax.Array) -> jax.Array:
    """Columns at unit length, in at least float32; zero columns and their gradients stay zero."""
    scaled, _ = constant_unit_max(v.mT[..., None])  # each column by itself
    v = scaled[..., 0].mT
    squares = jnp.sum(jnp.square(v), axis=-2, keepdims=True)
    return jnp.where(squares == 0, 0, v * lax.rsqrt(jnp.where(squares == 0, 1, squares)))


def _check_tall(call: str, argument: str, x: Any) -> Any:
    x = check_matrices(call, x, argument, kind=jnp.floating)
    if x.shape[-2] < x.shape[-1]:
        accepted = "it must not have more columns than rows. Transpose a wide matrix"
        raise ValueError(f"{call}: {argument} has shape {x.shape}; {accepted}.")
    return x
