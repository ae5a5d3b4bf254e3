r"""Penalties on the distance of a matrix from orthogonality: from arrays to scalars.

All but `lambda_orthogonality` pull towards :math:`W^T W = I`, of the shorter side. Each is used in
two ways: in a loss, `loss + strength * penalty(w)`, or in a chain, with `orthax.add_penalty`.
Penalties of convolution kernels are in `orthax.conv_penalties`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orthax._memory import WithMemory
from orthax._numbers import check_number
from orthax.linalg._deviation import gram_deviation, short_side_first
from orthax.linalg._norms import norm_with_gradient
from orthax.linalg._spectral import power_iteration, start_vector, unit, vector_norm
from orthax.linalg._validate import check_matrices, integer_of

__all__ = [
    "WithMemory",
    "double_soft_orthogonality",
    "lambda_orthogonality",
    "mutual_coherence",
    "soft_orthogonality",
    "spectral_restricted_isometry",
    "warm_spectral_restricted_isometry",
]


def soft_orthogonality(w: jax.Array) -> jax.Array:
    r"""Squared Frobenius distance of the Gram matrix from the identity, :math:`\|W^T W - I\|_F^2`.

    Its gradient is :math:`4 W (W^T W - I)`; value and gradient take two large products.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Where m < n, rows take the place of
        columns: :math:`W W^T` has the rank to be an identity then, :math:`W^T W` has not.

    Returns:
      Scalar, the sum over all matrices, so that each has the gradient it would have alone; float32
      for 16-bit input, else the precision of `w`. At least 0, and 0 iff all matrices are
      orthogonal. Fourth powers of entries overflow where these are near 1e9 (float32).

    Raises:
      ValueError: If `w` has fewer than two axes.
      TypeError: If `w` is not floating.

    Example:
      >>> print(soft_orthogonality(jnp.array([[2.0, 0.0], [0.0, 1.0]])))
      9.0

    Reference:
      Bansal, Chen and Wang, Can We Gain More from Orthogonality Regularizations, 2018,
      <https://arxiv.org/abs/1810.09102>, equation 2.
    """
    deviation = _deviation("soft_orthogonality", w)
    return jnp.sum(jnp.square(deviation.real) + jnp.square(deviation.imag))


def double_soft_orthogonality(w: jax.Array) -> jax.Array:
    r"""Squared distance of both Gram matrices from identities, without its floor.

    :math:`\|W^T W - I_n\|_F^2 + \|W W^T - I_m\|_F^2 - |m - n|`. The larger Gram matrix lacks the
    rank to be an identity by |m - n|; without that constant, both sides measure the same and the
    penalty equals twice `soft_orthogonality`, which is how it is computed.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal.

    Raises:
      ValueError: If `w` has fewer than two axes.
      TypeError: If `w` is not floating.

    Example:
      >>> print(double_soft_orthogonality(jnp.array([[2.0, 0.0]])))
      18.0

    Reference:
      Bansal, Chen and Wang, 2018, <https://arxiv.org/abs/1810.09102>, equation 4.
    """
    check_matrices("double_soft_orthogonality", w, "w")
    return 2 * soft_orthogonality(w)


def mutual_coherence(w: jax.Array) -> jax.Array:
    r"""Largest entry of the Gram matrix's distance from the identity, :math:`\max |W^T W - I|`.

    For columns of unit length that is the largest cosine between two of them: their coherence.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal. The gradient is a
      subgradient: shared equally by the entries that attain the maximum.

    Raises:
      ValueError: If `w` has fewer than two axes.
      TypeError: If `w` is not floating.

    Example:
      >>> print(mutual_coherence(jnp.array([[1.0, 0.5], [0.0, 1.0]])))
      0.5

    Reference:
      Bansal, Chen and Wang, 2018, <https://arxiv.org/abs/1810.09102>, equation 5.
    """
    deviation = _deviation("mutual_coherence", w)
    # The magnitudes, with slope zero at zero.
    sign = lax.stop_gradient(jnp.sign(deviation))
    sizes = jnp.real(deviation * jnp.conj(sign))
    return jnp.sum(jnp.max(sizes, axis=(-2, -1), initial=0))


def spectral_restricted_isometry(
    w: jax.Array, *, steps: int = 10, squared: bool = False
) -> jax.Array:
    r"""Spectral norm of the Gram matrix's distance from the identity (SRIP).

    :math:`\sigma_{\max}(W^T W - I)` is the largest :math:`|s^2 - 1|` over singular values s. It is
    estimated by power iteration on products with vectors; the Gram matrix is never formed.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.
      steps: Steps of the power iteration, at least 1, from a fixed random vector. The paper takes
        2 from a new random vector each time. In training, `warm_spectral_restricted_isometry` does
        with 1.
      squared: Whether to square the norm, as the paper's code does.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal. The estimate is
      never above the norm; ten steps reach 0.84 to 0.99 of it on Gaussian matrices with sides of
      256 to 1000. The gradient takes the vector for constant, which is exact in the limit.

    Raises:
      ValueError: If `w` has fewer than two axes or `steps` is less than 1.
      TypeError: If `w` is not floating or `steps` no integer.

    Example:
      >>> print(spectral_restricted_isometry(jnp.array([[2.0, 0.0], [0.0, 1.0]])).round(4))
      3.0

    Reference:
      Bansal, Chen and Wang, 2018, <https://arxiv.org/abs/1810.09102>, equations 8 and 9.
    """
    init, apply = _restricted_isometry("spectral_restricted_isometry", steps, squared)
    return apply(w, init(w))[0]


def warm_spectral_restricted_isometry(*, steps: int = 1, squared: bool = False) -> WithMemory:
    """`spectral_restricted_isometry` that goes on from the vector of the last call.

    Weights change little from update to update, so the vector follows with a single step: two
    products with vectors forwards and three backwards, instead of ten times two.

    Args:
      steps: Steps of the power iteration at each call, at least 1.
      squared: Whether to square the norm.

    Returns:
      A `WithMemory` for `orthax.add_penalty`, or for a loss by hand: `init(w)` gives the first
      vector, `apply(w, vector)` the penalty and the next vector.
      Memory: float32 or more precise, one vector of min(m, n) entries per matrix.

    Raises:
      ValueError: If `steps` is less than 1; in `apply`, if `w` has fewer than two axes.
      TypeError: If `steps` is no integer; in `apply`, if `w` is not floating.

    Example:
      >>> init, apply = warm_spectral_restricted_isometry()
      >>> w = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> vector = init(w)
      >>> for _ in range(3):
      ...     penalty, vector = apply(w, vector)
      >>> print(penalty.round(4))
      3.0
    """
    return _restricted_isometry("warm_spectral_restricted_isometry", steps, squared)


def lambda_orthogonality(
    w: jax.Array, radius: jax.typing.ArrayLike, sharpness: jax.typing.ArrayLike = 10.0
) -> jax.Array:
    r"""Distance of the Gram matrix from the identity, free within a radius (λ-orthogonality).

    With :math:`x = \|W^T W - I\|_F`, not squared, the penalty is :math:`\sigma(\alpha (x -
    \lambda)) \, x`: the whole distance where it exceeds the radius λ, and fading below. Of all
    matrices it holds those back that are further than λ from orthogonal, and lets the others adapt.

    Inside the radius the force is small but not zero. It is strongest near the radius, where it is
    :math:`\alpha \lambda / 4 + 1/2`, and falls to 1 outside: times the strength of the penalty, it
    must exceed the pull of the data there, or the matrix escapes. More than that only slows the
    optimizer. The distance settles a little below the radius; for exactly orthogonal matrices,
    radius 0, take `orthax.keep_orthogonal`.

    Args:
      w: Matrices, shape (..., m, n), real or complex floating. Columns, or the rows where m < n.
      radius: λ, at least 0. 0 gates nothing but distances below 1 / sharpness; infinity frees the
        matrix. The paper's is 12 for 512 features; :math:`12 \sqrt{n / 512}` is the same deviation
        per singular value for others.
      sharpness: α, at least 0: how suddenly the gate closes. The paper does not state its own.

    Returns:
      Scalar, the sum over all matrices; at least 0, and 0 iff all are orthogonal. The gradient at
      exactly orthogonal matrices is zero.

    Raises:
      ValueError: If `w` has fewer than two axes, `radius` or `sharpness` is negative or NaN,
        or `sharpness` infinite.
      TypeError: If `w` is not floating, or `radius` or `sharpness` no number.

    Example:
      >>> w = jnp.array([[2.0, 0.0], [0.0, 1.0]])  # 3 from orthogonal
      >>> print(lambda_orthogonality(w, radius=1.0).round(2), lambda_orthogonality(w, 4.0).round(2))
      3.0 0.0

    Reference:
      Ricci et al., λ-Orthogonality Regularization for Compatible Representation Learning, 2025,
      <https://arxiv.org/abs/2509.16664>, equation 6.
    """
    call = "lambda_orthogonality"
    for argument, x in {"radius": radius, "sharpness": sharpness}.items():
        if np.ndim(x):
            raise TypeError(f"{call}: {argument} must be one number, got {x!r}.")
    # As floats: an array compared under `jit` is no longer known.
    check_number(call, "radius", radius, "be at least 0", lambda r: float(r) >= 0)
    finite = "be finite and at least 0"
    check_number(call, "sharpness", sharpness, finite, lambda a: 0 <= float(a) < math.inf)
    distance = norm_with_gradient(_deviation(call, w))
    free = jnp.isinf(radius)
    excess = distance - jnp.where(free, 0, radius).astype(distance.dtype)
    gate = jnp.where(free, 0, jax.nn.sigmoid(jnp.asarray(sharpness, distance.dtype) * excess))
    return jnp.sum(gate * distance)


def _deviation(call: str, w: jax.Array) -> jax.Array:
    check_matrices(call, w, "w")
    return gram_deviation(w)


def _restricted_isometry(call: str, steps: int, squared: bool) -> WithMemory:
    steps = integer_of(call, "steps", steps)

    def init(w: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        check_matrices(call, w, "w")
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        short = min(w.shape[-2:])
        return start_vector(call, None, jnp.zeros((*w.shape[:-2], 0, 0), dtype), short)

    def apply(w: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        check_matrices(call, w, "w")
        y = short_side_first(w)

        def deviation_times(v: jax.Array, y: jax.Array) -> jax.Array:
            return _product(y, _product(y.mT.conj(), v)) - v

        fixed = lax.stop_gradient(y)
        start = start_vector(call, vector, fixed, y.shape[-2])
        v = power_iteration(lambda v: deviation_times(v, fixed), start, steps - 1)
        image = deviation_times(v, y)
        norm = vector_norm(image)
        return jnp.sum(jnp.square(norm) if squared else norm), unit(lax.stop_gradient(image), v)

    return WithMemory(init, apply)


def _product(x: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(x, v[..., None], precision=lax.Precision.HIGHEST)[..., 0]
