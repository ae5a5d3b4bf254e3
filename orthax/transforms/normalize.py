"""`normalize_neurons`: NorMuon's second moment per neuron, which evens the neurons' step sizes."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import each_matrix
from orthax.base.placing import resized_zeros
from orthax.linalg.elementary import (
    abs_square,
    divided,
    frobenius_norm,
    number_for,
    root,
    unit_max,
    weighted_hypot,
    wide,
    wide_dtype,
)

_AXES = ("output", "long")


class NormalizeNeuronsState(NamedTuple):
    """State of `normalize_neurons`.

    Attributes:
      rms: Root of each neuron's second moment, (..., 1, n) or, in rows, (..., m, 1), real, float32.
    """

    rms: optax.Updates


def normalize_neurons(
    decay: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-10,
    axis: Literal["output", "long"] = "output",
) -> optax.GradientTransformation:
    r"""Divides each neuron's update by its running RMS and restores the matrix's Frobenius norm.

    With :math:`O` the (orthogonalised) update and :math:`v_j` the second moment of neuron j,
    :math:`v_j \leftarrow \beta v_j + (1 - \beta) \mathrm{mean}_i O_{ij}^2`,
    :math:`\hat O_{ij} = O_{ij} / (\sqrt{v_j} + \epsilon)` and the update is
    :math:`\hat O \, \|O\|_F / \|\hat O\|_F`. There is no bias correction: a common factor cancels.

    After an exact orthogonalisation of a matrix with fan_out <= fan_in all columns already have
    norm 1 and `axis="output"` changes nothing but what the approximation left uneven: it acts on
    matrices with more neurons than inputs, and `axis="long"` on either kind.
    Reference: Li et al., NorMuon, 2025, <https://arxiv.org/abs/2510.05491>, Algorithm 1.

    Args:
      decay: Decay of the second moment, in [0, 1).
      eps: Added to the RMS; an absolute number, as in the paper: updates near it are evened less.
      axis: Which vectors are neurons: "output" the columns, as in the paper and Dion's repository;
        "long" those along the longer (modded-nanogpt, NVIDIA); the same for fan_out >= fan_in.

    Returns:
      A transformation; a zero matrix gives exactly zero and the result is finite for finite input.
      State: `NormalizeNeuronsState`, one number per neuron (4 / fan_in bytes per parameter).
      Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      ValueError: For `decay` outside [0, 1), `eps` < 0, an unknown `axis` or fewer than two axes.
      TypeError: If `decay` or `eps` is no number; for an integer leaf.

    Example:
      >>> tx = normalize_neurons(decay=0.0)
      >>> uneven = jnp.array([[3.0, 4.0, 0.0]])
      >>> updates, _ = tx.update(uneven, tx.init(uneven))
      >>> print((updates / updates.max()).round(3))
      [[1. 1. 0.]]
    """
    check.number("normalize_neurons: decay", decay, "[0, 1)")
    check.number("normalize_neurons: eps", eps, "[0, inf)")
    check.choice("normalize_neurons: axis", axis, _AXES)

    def along(x: Any) -> int:
        """The axis of a neuron's entries: a neuron is a column; a row in the paper, with W^T."""
        return -1 if axis == "long" and x.shape[-2] > x.shape[-1] else -2

    def first_rms(x: Any) -> jax.Array:
        return resized_zeros(x, along(x), 1, jnp.finfo(wide_dtype(x.dtype)).dtype)

    def rms_of_neurons(x: jax.Array) -> jax.Array:
        over = along(x)
        scaled, scale = unit_max(x)
        squares = jnp.sum(abs_square(scaled), axis=over, keepdims=True)
        return scale * root(squares / max(1, x.shape[over]))

    def evened(x: Any, rms: Any, decay: Any, eps: Any) -> tuple[jax.Array, jax.Array]:
        x = wide(x)
        decay, eps = number_for(x, decay), number_for(x, eps)
        # Algorithm 1, the second moment: the root of decay * rms**2 + (1 - decay) * new**2, without
        # squares that overflow.
        rms = weighted_hypot(rms, rms_of_neurons(x), decay, 1 - decay)
        # Algorithm 1, the division by its root, entry by entry.
        even = divided(x, rms + eps)
        # The norm that the matrix had, as in the official code; the paper scales to its own.
        before, after = frobenius_norm(x), frobenius_norm(even)
        factor = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 0)
        return even * factor.astype(x.dtype), rms

    return each_matrix(
        "normalize_neurons",
        evened,
        numbers=(decay, eps),
        init=lambda x: (first_rms(x),),
        state_type=NormalizeNeuronsState,
    )
