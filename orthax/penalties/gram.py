r"""Penalties that read the whole Gram matrix: soft, double soft, coherence, λ-orthogonality."""

import jax
import jax.numpy as jnp
from jax import lax

from orthax.base import check
from orthax.base.leaves import check_matrices, value_of
from orthax.linalg.elementary import abs_square, gram_deviation, norm_with_gradient


def soft_orthogonality(w: jax.Array) -> jax.Array:
    r"""Pulls matrices towards orthogonal ones by the squared distance :math:`\|W^T W - I\|_F^2`.

    Its gradient is :math:`4 W (W^T W - I)`; value and gradient take two large products.
    Reference: Bansal, Chen and Wang, Can We Gain More from Orthogonality Regularizations, 2018,
    <https://arxiv.org/abs/1810.09102>, equation 2.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Where m < n, rows take the place of
        columns: :math:`W W^T` has the rank to be an identity then.

    Returns:
      Scalar, the sum over all matrices; float32 for 16-bit input, else the precision of `w`. At
      least 0, and 0 iff all are orthogonal. Fourth powers of entries overflow near 1e9 (float32).

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(soft_orthogonality(jnp.array([[2.0, 0.0], [0.0, 1.0]])))
      9.0
    """
    deviation = _deviation("soft_orthogonality", w)
    return jnp.sum(abs_square(deviation))


def double_soft_orthogonality(w: jax.Array) -> jax.Array:
    r"""Squared distance of both Gram matrices from identities, without its floor.

    :math:`\|W^T W - I_n\|_F^2 + \|W W^T - I_m\|_F^2 - |m - n|`, the last being what the larger Gram
    matrix lacks in rank. It equals twice `soft_orthogonality`, which is how it is computed.
    Reference: Bansal, Chen and Wang, 2018, <https://arxiv.org/abs/1810.09102>, equation 4.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal.

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(double_soft_orthogonality(jnp.array([[2.0, 0.0]])))
      18.0
    """
    w = check_matrices("double_soft_orthogonality", w, "w")
    # Both sums are of (s^2 - 1)^2 over singular values s; the larger Gram matrix has |m - n|
    # eigenvalues 0 besides, each 1 from the identity.
    return 2 * soft_orthogonality(w)


def mutual_coherence(w: jax.Array) -> jax.Array:
    r"""Pulls the two most similar columns apart: :math:`\max |W^T W - I|`, the largest entry.

    For columns of unit length that is the largest cosine between two of them: their coherence.
    Reference: Bansal, Chen and Wang, 2018, <https://arxiv.org/abs/1810.09102>, equation 5.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal. The gradient is a
      subgradient: shared equally by the entries that attain the maximum.

    Raises:
      ValueError: If `w` has fewer than two axes; TypeError: if `w` is not floating.

    Example:
      >>> print(mutual_coherence(jnp.array([[1.0, 0.5], [0.0, 1.0]])))
      0.5
    """
    deviation = _deviation("mutual_coherence", w)
    # The magnitudes, with slope zero at zero, where `abs` of a complex number has none.
    sign = lax.stop_gradient(jnp.sign(deviation))
    sizes = jnp.real(deviation * jnp.conj(sign))
    return jnp.sum(jnp.max(sizes, axis=(-2, -1), initial=0))


def lambda_orthogonality(
    w: jax.Array, radius: jax.typing.ArrayLike, sharpness: jax.typing.ArrayLike = 10.0
) -> jax.Array:
    r"""Keeps matrices near orthogonal ones, but free to adapt within a radius (λ-orthogonality).

    With :math:`x = \|W^T W - I\|_F`, not squared, the penalty is :math:`\sigma(\alpha (x -
    \lambda)) \, x`: the whole distance where it exceeds the radius λ, and fading below.

    The force is strongest near the radius, :math:`\alpha \lambda / 4 + 1/2`, and falls to 1
    outside: times the strength of the penalty, it must exceed the pull of the data there, or the
    matrix escapes. More than that only slows the optimizer. The distance settles a little below the
    radius; for exactly orthogonal matrices, radius 0, take `orthax.keep_orthogonal`.
    Reference: Ricci et al., λ-Orthogonality Regularization for Compatible Representation Learning,
    2025, <https://arxiv.org/abs/2509.16664>, equation 6.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.
      radius: λ, at least 0. 0 gates nothing but distances below 1 / sharpness; infinity frees the
        matrix. The paper's is 12 for 512 features; :math:`12 \sqrt{n / 512}` is the same deviation
        per singular value for others.
      sharpness: α, at least 0: how suddenly the gate closes. The paper does not state its own.

    Returns:
      Scalar, the sum over all matrices; 0, with gradient 0, iff all are orthogonal, else positive.

    Raises:
      ValueError: If `w` has fewer than two axes, `radius` or `sharpness` is negative or NaN, or
        `sharpness` infinite; TypeError: if `w` is not floating, or one of them no number.

    Example:
      >>> w = jnp.array([[2.0, 0.0], [0.0, 1.0]])  # 3 from orthogonal
      >>> print(lambda_orthogonality(w, radius=1.0).round(2), lambda_orthogonality(w, 4.0).round(2))
      3.0 0.0
    """
    call = "lambda_orthogonality"
    radius, sharpness = value_of(radius), value_of(sharpness)
    check.number(f"{call}: radius", radius, "[0, inf]")
    check.number(f"{call}: sharpness", sharpness, "[0, inf)")
    # Not squared, the norm has no gradient at orthogonal matrices, where training may well start.
    # An infinite radius is set apart, since 0 times infinity would be NaN.
    distance = norm_with_gradient(_deviation(call, w))
    free = jnp.isinf(radius)
    excess = distance - jnp.where(free, 0, radius).astype(distance.dtype)
    gate = jnp.where(free, 0, jax.nn.sigmoid(jnp.asarray(sharpness, distance.dtype) * excess))
    return jnp.sum(gate * distance)


def _deviation(call: str, w: jax.Array) -> jax.Array:
    w = check_matrices(call, w, "w")
    return gram_deviation(w)
