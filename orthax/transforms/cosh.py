"""`scale_by_cosh_rms`: AuON's direction, a matrix over the root mean square of its cosh."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from orthax.transforms._small_matrices import map_matrices_stacking_small

_MODES = ("paper", "code", "rms")
_EPS = 1e-8  # the paper's; R is at least 1


def scale_by_cosh_rms(
    gamma: jax.typing.ArrayLike = 1.0, mode: Literal["paper", "code", "rms"] = "paper"
) -> optax.GradientTransformation:
    r"""Divides each matrix by the root mean square R of its entries' cosh: AuON's direction.

    With :math:`X = M / \|M\|_F` and N entries, the update is, by `mode`,

    * "paper": :math:`X / R` with :math:`R^2 = \mathrm{mean} \cosh^2(\gamma X_{ij})`;
    * "code": :math:`M / R` with the same R, the published repository's;
    * "rms": :math:`X / R` with :math:`R^2 = \mathrm{mean} \cosh^2(\gamma \sqrt{N} X_{ij})`, the
      entries in units of their root mean square. An extension of ours.

    In the first two R hardly differs from 1: R - 1 is about :math:`\gamma^2 / 2N`, at gamma 1
    it is 1.2e-4 for a 64 x 64 matrix and 2e-7 for 768 x 3072, two roundings of float32. So the
    paper's direction is the matrix divided by its Frobenius norm, the repository's is the matrix
    itself, and neither slows down for outliers.

    In "rms" R does: at gamma 1 and 768 x 3072 it is 2.05 for normal entries, 7.5 once a single one
    of them is 10 times the RMS, 1.6e5 at 20 times and 9e64 for Student's t with 3 degrees of
    freedom. Heavy-tailed momentum nearly stops, or stops where 1 / R underflows.

    Args:
      gamma: Factor in the cosh, at least 0. The repository's is 1.5.
      mode: Which of the three. In `optax.inject_hyperparams`, list it in `static_args`.

    Returns:
      A stateless transformation. The norm is guarded by the largest entry and not, as in paper and
      repository, by adding 1e-7, so "paper" and "rms" do not depend on the scale of the matrix. A
      zero matrix stays zero; no finite input overflows; a NaN or infinity makes its matrix NaN.
      State: none.
      Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      ValueError: If `gamma` is negative or not finite, or `mode` is unknown; at `update`, for a
        leaf of fewer than two axes.
      TypeError: For an integer leaf.

    Example:
      >>> x = jnp.array([[3.0, -4.0]])
      >>> for mode in ("paper", "code", "rms"):
      ...     updates, _ = scale_by_cosh_rms(mode=mode).update(x, optax.EmptyState())
      ...     print(mode, updates.round(1))
      paper [[ 0.5 -0.6]]
      code [[ 2.4 -3.2]]
      rms [[ 0.4 -0.5]]

    Reference:
      Maity, AuON, 2025, <https://arxiv.org/abs/2509.24320>.
    """
    if isinstance(gamma, (int, float)) and not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"scale_by_cosh_rms: gamma must be finite and at least 0, got {gamma!r}.")
    if mode not in _MODES:
        raise ValueError(f"scale_by_cosh_rms: mode must be one of {_MODES}, got {mode!r}.")

    def scaled(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        units = math.sqrt(math.prod(x.shape[-2:])) if mode == "rms" else 1
        factor, norm, brake = _norm_and_brake(wide, gamma * units)
        if mode == "code":
            return (wide * brake).astype(x.dtype)
        half = jnp.sqrt(factor)  # 1 / norm itself may underflow
        return (wide * half * (half * brake / norm)).astype(x.dtype)

    def update(updates: Any, params: Any) -> Any:
        del params
        return map_matrices_stacking_small("scale_by_cosh_rms", scaled, updates)

    return optax.stateless(update)


def _norm_and_brake(x: jax.Array, gamma: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A factor f, the norm of f x and 1 / (R + 1e-8) of each matrix.

    On CPU the pass over x for its largest entry costs as much as the momentum; it is left out if
    nothing overflows without. Elsewhere a branch, which waits for the device, costs more.
    """

    def guarded(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, tiny = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), jnp.finfo(x.dtype).tiny
        counts = (largest >= tiny) | jnp.isnan(largest)
        # A normal number, so that it is not flushed to zero, and zero for what counts as zero.
        inverse = jnp.maximum(1 / jnp.where(counts, largest, 1), tiny) * counts
        norm, brake, _ = _passes(x, inverse, gamma, largest_is_one=True)
        return inverse, norm, brake

    if jax.default_backend() != "cpu":
        return guarded(x)
    norm, brake, right = _passes(x, 1.0, gamma)
    return jax.lax.cond(right, lambda _: (jnp.ones_like(norm), norm, brake), guarded, x)


def _passes(
    x: jax.Array, factor: Any, gamma: Any, largest_is_one: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm of f x, 1 / (R + 1e-8) and whether both are right, in two passes.

    R^2 = mean cosh^2(z) = 1 + mean sinh^2(z), z = gamma |f x| / norm. All is over exp(shift), which
    is zero unless the largest z is known and its square would overflow. No expression may be common
    to the passes, nor to the final scaling: XLA would write it, a whole matrix, to memory.
    """
    finfo, size = jnp.finfo(x.dtype), math.prod(x.shape[-2:])
    squares = jnp.sum(jnp.square(jnp.abs(x * factor)), axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    top = jnp.asarray(gamma / norm, norm.dtype)
    half = jnp.sqrt(factor) * jnp.sqrt(top)
    shift = jnp.maximum(top - math.log(float(finfo.max)) / 4, 0) if largest_is_one else 0.0
    rest = jnp.exp(-2 * shift)
    grown = jnp.exp(jnp.abs(x * half * half) - shift)
    twice_sinh = grown - rest / jnp.maximum(grown, finfo.tiny)
    mean = rest + jnp.mean(jnp.square(twice_sinh), axis=(-2, -1), keepdims=True) / 4
    brake = jnp.exp(-shift) / (jnp.sqrt(jnp.maximum(mean, finfo.tiny)) + _EPS * jnp.exp(-shift))
    in_range = (squares > size * finfo.tiny / finfo.eps) & (squares < finfo.max)
    return norm, brake, jnp.all(in_range & (mean < finfo.max))
