"""`scale_by_cosh_rms`: AuON's direction, a matrix over the root mean square of its cosh."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import SMALL, each_matrix
from orthax.linalg.elementary import norm_of_scaled, number_for, unit_max, wide

MODES = ("paper", "code", "rms")
_EPS = 1e-8  # the paper's; R is at least 1


def scale_by_cosh_rms(
    gamma: jax.typing.ArrayLike = 1.0, mode: Literal["paper", "code", "rms"] = "paper"
) -> optax.GradientTransformation:
    r"""Divides each matrix by the root mean square R of its entries' cosh: AuON's direction.

    With :math:`X = M / \|M\|_F` and N entries, the update is, by `mode`,

    * "paper": :math:`X / R` with :math:`R^2 = \mathrm{mean} \cosh^2(\gamma X_{ij})`;
    * "code": :math:`M / R` with the same R, the published repository's;
    * "rms": :math:`X / R` with :math:`R^2 = \mathrm{mean} \cosh^2(\gamma \sqrt{N} X_{ij})`, of
      entries in units of their root mean square. An extension of ours.

    In the first two R hardly differs from 1: R - 1 is about :math:`\gamma^2 / 2N`, at gamma 1
    1.2e-4 for a 64 x 64 matrix and 2e-7 for 768 x 3072, two roundings of float32. So the paper's
    direction is the matrix over its Frobenius norm, the repository's is the matrix itself, and
    neither slows down for outliers. In "rms" R does: at gamma 1 and 768 x 3072 it is 2.05 for
    normal entries, 7.5 once a single one is 10 times the RMS, 1.6e5 at 20 times and 9e64 for
    Student's t with 3 degrees of freedom. Heavy-tailed momentum nearly stops, or 1 / R underflows.
    Reference: Maity, AuON, 2025, <https://arxiv.org/abs/2509.24320>.

    Args:
      gamma: Factor in the cosh, at least 0. The repository's is 1.5.
      mode: Which of the three. In `optax.inject_hyperparams`, list it in `static_args`.

    Returns:
      A stateless transformation. The norm is guarded by the largest entry and not, as in paper and
      repository, by adding 1e-7, so "paper" and "rms" do not depend on the matrix's scale. A zero
      matrix stays zero; no finite input overflows; a NaN or infinity makes its matrix NaN.
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      ValueError: If `gamma` is negative or not finite, or `mode` unknown; at `update`, for a leaf
        of fewer than two axes; TypeError: if `gamma` is no number; for an integer leaf.

    Example:
      >>> x = jnp.array([[3.0, -4.0]])
      >>> updates, _ = scale_by_cosh_rms(mode="code").update(x, optax.EmptyState())
      >>> print(updates.round(1))
      [[ 2.4 -3.2]]
    """
    check.number("scale_by_cosh_rms: gamma", gamma, "[0, inf)")
    check.choice("scale_by_cosh_rms: mode", mode, MODES)

    def scaled(x: jax.Array, gamma: jax.typing.ArrayLike) -> jax.Array:
        units = math.sqrt(math.prod(x.shape[-2:])) if mode == "rms" else 1
        largest_is_one, _ = unit_max(x)
        norm = norm_of_scaled(largest_is_one)
        brake = _brake(largest_is_one, number_for(norm, gamma) * units / norm)
        if mode == "code":
            return wide(x) * brake.astype(largest_is_one.dtype)
        return largest_is_one * (brake / norm).astype(largest_is_one.dtype)

    return each_matrix("scale_by_cosh_rms", scaled, numbers=(gamma,), share=SMALL)


def _brake(x: jax.Array, gamma: jax.typing.ArrayLike) -> jax.Array:
    """1 / (R + 1e-8) with R^2 = mean cosh(gamma |x|)^2 = 1 + mean sinh(gamma |x|)^2.

    The largest |x| is 1, or up to sqrt(2) for complex x. Where its square would overflow, all is
    divided by exp(shift). What is as large as x is used once: XLA would write it to memory else.
    """
    finfo = jnp.finfo(x.dtype)
    largest = gamma * (math.sqrt(2) if jnp.iscomplexobj(x) else 1)
    shift = jnp.maximum(largest - math.log(float(finfo.max)) / 4, 0)
    square = jnp.exp(-2 * shift)
    grown = jnp.exp(gamma * jnp.abs(x) - shift)
    twice_sinh = grown - square / jnp.maximum(grown, finfo.tiny)
    mean = square + jnp.mean(jnp.square(twice_sinh), axis=(-2, -1), keepdims=True) / 4
    return jnp.exp(-shift) / (jnp.sqrt(jnp.maximum(mean, finfo.tiny)) + _EPS * jnp.exp(-shift))
