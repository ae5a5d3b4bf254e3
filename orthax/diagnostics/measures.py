"""Numbers to watch in training: functions of matrices to one number for each."""

from typing import Literal

import jax
import jax.numpy as jnp

from orthax.base import check
from orthax.base.leaves import check_matrices
from orthax.base.with_memory import WithMemory
from orthax.linalg.elementary import (
    constant_unit_max,
    frobenius_norm,
    gram_deviation,
    norm_with_gradient,
    root,
    unit_max,
    wide_dtype,
)
from orthax.linalg.spectral import spectral_norm, start_vector

_NORMS = ("frobenius", "spectral")


def orthogonality_error(
    w: jax.Array, norm: Literal["frobenius", "spectral"] = "frobenius"
) -> jax.Array:
    r"""How far matrices are from orthogonal, :math:`\|W^T W - I\|`.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.
      norm: "frobenius", the x of λ-orthogonality, for one product; or "spectral", the largest
        :math:`|s^2 - 1|`, exactly, for the eigenvalues of the Gram matrix as well.

    Returns:
      Shape (...,), real, in at least float32. 0 iff orthogonal; in float32, 1e-5 is to rounding.

    Raises:
      ValueError: For fewer than two axes or an unknown `norm`; TypeError: if `w` is not floating.

    Example:
      >>> print(orthogonality_error(jnp.array([[2.0, 0.0], [0.0, 1.0]])))
      3.0
    """
    call = "orthogonality_error"
    w = check_matrices(call, w, "w")
    check.choice(f"{call}: norm", norm, _NORMS)
    # Eigenvalues and not singular values: the deviation is Hermitian, so they cost less.
    deviation = gram_deviation(w)
    if norm == "frobenius":
        return norm_with_gradient(deviation)
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(deviation)), axis=-1, initial=0)


def singular_values(w: jax.Array) -> jax.Array:
    """Singular values of each matrix, decreasing.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Any scale.

    Returns:
      Shape (..., min(m, n)), real; float32 for 16-bit input, else the precision of `w`.

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(singular_values(jnp.array([[0.0, 2.0], [3.0, 0.0]])))
      [3. 2.]
    """
    w = check_matrices("singular_values", w, "w")
    scaled, scale = unit_max(w)
    return jnp.linalg.svd(scaled, compute_uv=False) * scale[..., 0]


def stable_rank(w: jax.Array, steps: int = 30) -> jax.Array:
    r"""How many directions a matrix uses: squared Frobenius over squared spectral norm.

    :math:`\|W\|_F^2 / \|W\|_2^2`, a lower bound on the rank, not changed by small singular values.
    Reference: Rudelson and Vershynin, Sampling from Large Matrices, 2007,
    <https://arxiv.org/abs/math/0503442>.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Any scale.
      steps: Steps of the power iteration for the spectral norm, see `orthax.linalg.spectral_norm`.
        The norm is never overestimated, so the stable rank is never underestimated: for Gaussian
        matrices by 2 % (at most 11 %) after 30 steps and 0.1 % (at most 3 %) after 100, by nothing
        where a singular value stands out.

    Returns:
      Shape (...,), real, between 1 and min(m, n) but for that error; 0 for a zero matrix.

    Raises:
      ValueError: If `w` has fewer than two axes or `steps` is less than 1.
      TypeError: If `w` is not floating or `steps` no integer.

    Example:
      >>> print(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))).round(4))
      1.5
    """
    w = check_matrices("stable_rank", w, "w")
    check.integer("stable_rank: steps", steps)
    # The ratio of norms is squared, not the norms: these may be out of the range of squares.
    scaled, _ = unit_max(w)
    spectral = spectral_norm(scaled, steps=steps).norm
    ratio = frobenius_norm(scaled)[..., 0, 0] / jnp.where(spectral == 0, 1, spectral)
    return jnp.square(ratio)


def effective_rank(w: jax.Array) -> jax.Array:
    r"""How evenly a matrix uses its directions: exponential of its singular values' entropy.

    :math:`\exp(-\sum_i p_i \log p_i)`, :math:`p_i = s_i / \sum_j s_j`: k for k equal values.
    Reference: Roy and Vetterli, The Effective Rank, 2007,
    <https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf>.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Any scale.

    Returns:
      Shape (...,), real, between 1 and min(m, n); 0 for a zero matrix. Takes a decomposition. Its
      gradient leaves out singular values that are zero, where the slope is infinite.

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(effective_rank(jnp.diag(jnp.array([5.0, 5.0, 0.0]))).round(4))
      2.0
    """
    w = check_matrices("effective_rank", w, "w")
    s = singular_values(unit_max(w)[0])
    total = jnp.sum(s, axis=-1, keepdims=True)
    # A zero matrix has no shares to sum: its rank is 0, not exp(0) = 1. 0 log 0 is 0, with slope 0:
    # the one-sided slope is infinite there.
    p = s / jnp.where(total == 0, 1, total)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p == 0, 1, p)), axis=-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def neuron_norm_spread(w: jax.Array) -> jax.Array:
    """How unequal the neurons are: standard deviation over mean of the lengths of the columns.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Any scale.

    Returns:
      Shape (...,), real; 0 where all columns have equal length, and for a zero matrix, and there
      its gradient is 0 too.

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(neuron_norm_spread(jnp.array([[3.0, 1.0], [4.0, 0.0]])).round(4))
      0.6667
    """
    w = check_matrices("neuron_norm_spread", w, "w")
    # Every column, which is one neuron, as a matrix of its own.
    lengths = norm_with_gradient(constant_unit_max(w)[0].mT[..., None])
    mean = jnp.mean(lengths, axis=-1, keepdims=True)
    deviation = root(jnp.mean(jnp.square(lengths - mean), axis=-1))
    return deviation / jnp.where(mean == 0, 1, mean)[..., 0]


def update_to_weight_ratio(update: jax.Array, weight: jax.Array) -> jax.Array:
    """Frobenius norm of an update over that of the weights it changes.

    Args:
      update: Matrices, shape (..., m, n), real or complex floating. Any scale.
      weight: The weights before the update, of the same shape.

    Returns:
      Shape (...,), real; infinite for an update of zero weights, 0 for none.

    Raises:
      ValueError: For fewer than two axes or two shapes; TypeError: if either is not floating.

    Example:
      >>> print(update_to_weight_ratio(jnp.full((2, 2), 0.5), jnp.ones((2, 2))))
      0.5
    """
    call = "update_to_weight_ratio"
    update = check_matrices(call, update, "update")
    weight = check_matrices(call, weight, "weight")
    if update.shape != weight.shape:
        shapes = f"{update.shape} and {weight.shape}"
        raise ValueError(f"{call}: update and weight must have one shape, got {shapes}.")
    # Of norms that are zero the limits: no update is 0 of anything, an update of nothing infinite.
    ours, theirs = frobenius_norm(update)[..., 0, 0], frobenius_norm(weight)[..., 0, 0]
    ratio = ours / jnp.where(theirs == 0, 1, theirs)
    return jnp.where(theirs == 0, jnp.where(ours == 0, ours, jnp.inf), ratio)


def warm_spectral_norm(steps: int = 1) -> WithMemory:
    """Largest singular value, watched at low cost: power iteration goes on from call to call.

    Args:
      steps: Steps at each call, at least 1; see `orthax.linalg.spectral_norm`.

    Returns:
      A `WithMemory` for `of_updates`, `of_params` or use by hand. Value: the norm, shape (...,).
      Memory: one vector of n entries per matrix (..., m, n), float32 or more precise.

    Raises:
      ValueError: If `steps` is less than 1; TypeError: if `steps` is no integer.

    Example:
      >>> init, apply = warm_spectral_norm(steps=5)
      >>> w = jnp.diag(jnp.array([3.0, 1.0]))
      >>> norm, memory = apply(w, init(w))
      >>> print(norm.round(2))
      3.0
    """
    call = "warm_spectral_norm"
    check.integer(f"{call}: steps", steps)

    def init(w: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        w = check_matrices(call, w, "w")
        # Only shape and dtype of `w` are read: it may be a ShapeDtypeStruct.
        return start_vector(call, None, (*w.shape[:-2], w.shape[-1]), wide_dtype(w.dtype), w)

    def apply(w: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = check_matrices(call, w, "w")
        vector = start_vector(call, vector, (*w.shape[:-2], w.shape[-1]), wide_dtype(w.dtype), w)
        norm, vector, _ = spectral_norm(w, vector, steps)
        return norm, vector

    return WithMemory(init, apply)
