"""Shape scales: the factor between an orthogonal direction and an update of a useful size.

For matrices of fan_in rows and fan_out columns, as in `x @ W`. Names say what is matched: the field
calls three of these "spectral".
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import each_matrix
from orthax.linalg.elementary import normalize, number_for

_DIRECTIONS = ("orthogonal", "unit_norm")


def scale_by_width() -> optax.GradientTransformation:
    r"""Scales by :math:`\sqrt{\max(1, \text{fan\_out} / \text{fan\_in})}`, as the original Muon.

    An orthogonal direction then has entries of RMS :math:`1 / \sqrt{\text{fan\_in}}`.
    Reference: Jordan et al., Muon, 2024, <https://github.com/KellerJordan/Muon>.

    Returns:
      A stateless transformation. Sees: leaves (..., fan_in, fan_out); needs no params.
    """
    return _scale_by_shape(
        "scale_by_width", lambda rows, cols: math.sqrt(max(1, cols / max(1, rows)))
    )


def scale_by_unit_rms() -> optax.GradientTransformation:
    r"""Scales by :math:`\sqrt{\text{fan\_out} / \text{fan\_in}}`.

    An orthogonal direction then has RMS-to-RMS operator norm 1: inputs of unit RMS change the
    outputs by at most unit RMS, so that learning rates carry over between widths.
    Reference: Bernstein and Newhouse, Old Optimizer, New Norm, 2024,
    <https://arxiv.org/abs/2409.20325>.

    Returns:
      A stateless transformation. Sees: leaves (..., fan_in, fan_out); needs no params.
    """
    return _scale_by_shape("scale_by_unit_rms", lambda rows, cols: math.sqrt(cols / max(1, rows)))


def scale_by_adam_rms(
    rms: jax.typing.ArrayLike = 0.2, direction: Literal["orthogonal", "unit_norm"] = "orthogonal"
) -> optax.GradientTransformation:
    r"""Scales a direction of known norm so that its entries have about the RMS of Adam's updates.

    The factor is :math:`r \sqrt{\max(\text{fan\_in}, \text{fan\_out})}` for an orthogonal direction
    and :math:`r \sqrt{\text{fan\_in} \, \text{fan\_out}}` for one of unit Frobenius norm. Steps
    are then as large as AdamW's at the same rate; the best rate may be another (see `orthax.muon`).
    The norm is taken for granted, not measured: a direction of rank k below full has RMS :math:`r
    \sqrt{k / \min(\text{fan\_in}, \text{fan\_out})}`; see `scale_to_rms`.
    Reference: Liu et al., Muon is Scalable for LLM Training, 2025,
    <https://arxiv.org/abs/2502.16982>, Lemma 1.

    Args:
      rms: The RMS r of the result; 0.2 is what Adam's updates have in practice.
      direction: What the update is: "orthogonal" (all singular values 1) or "unit_norm".

    Returns:
      A stateless transformation. Sees: leaves (..., fan_in, fan_out); needs no params.

    Raises:
      ValueError: If `rms` is negative or not finite, or `direction` is unknown.
      TypeError: If `rms` is no number, or `direction` no string.
    """
    check.number("scale_by_adam_rms: rms", rms, "[0, inf)")
    check.choice("scale_by_adam_rms: direction", direction, _DIRECTIONS)
    entries = max if direction == "orthogonal" else lambda rows, cols: rows * cols
    return _scale_by_shape("scale_by_adam_rms", lambda *shape: math.sqrt(entries(*shape)), rms)


def scale_to_rms(rms: jax.typing.ArrayLike = 0.2) -> optax.GradientTransformation:
    """Scales each matrix so that its entries have exactly the given RMS, by measuring its norm.

    Args:
      rms: Root mean square of the result's entries.

    Returns:
      A stateless transformation; a zero matrix stays zero. Sees: leaves (..., m, n), no params.

    Raises:
      ValueError: If `rms` is negative or not finite; at `update`, for a leaf of fewer than two
        axes; TypeError: if `rms` is no number; at `update`, for an integer leaf.

    Reference: Li et al., NorMuon, 2025, <https://arxiv.org/abs/2510.05491> (its learning rate).
    """
    check.number("scale_to_rms: rms", rms, "[0, inf)")

    def scaled(x: jax.Array, rms: jax.typing.ArrayLike) -> jax.Array:
        unit = normalize(x)
        norm = number_for(unit, rms) * math.sqrt(math.prod(x.shape[-2:]))
        return jnp.asarray(norm, unit.dtype) * unit

    return each_matrix("scale_to_rms", scaled, numbers=(rms,))


def _scale_by_shape(
    call: str, factor: Callable[[int, int], float], rms: jax.typing.ArrayLike = 1
) -> optax.GradientTransformation:
    def factors(x: jax.Array, rms: jax.typing.ArrayLike) -> jax.Array:
        number = jnp.asarray(rms * factor(*x.shape[-2:])).astype(x.dtype)
        return jnp.broadcast_to(number, x.shape)

    return each_matrix(call, jnp.multiply, numbers=(rms,), per_shape=factors)
