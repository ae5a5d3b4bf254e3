"""`normalize_neurons`: NorMuon's second moment per neuron, which evens the neurons' step sizes."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax._numbers import check_number
from orthax.linalg import frobenius_norm
from orthax.linalg._norms import unit_max
from orthax.transforms._trees import map_matrices

_AXES = ("output", "long")


class NormalizeNeuronsState(NamedTuple):
    """State of `normalize_neurons`.

    Attributes:
      rms: Root of each neuron's second moment, shape (..., 1, n) for neurons in columns and (...,
        m, 1) for rows, real; float32 for 16-bit matrices.
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

    After an exact orthogonalisation of a matrix with no more columns than rows (fan_out <= fan_in)
    all columns already have norm 1 and `axis="output"` changes nothing but what the approximation
    left uneven. It acts on matrices with more neurons than inputs. `axis="long"` acts on either
    kind.

    Args:
      decay: Decay of the second moment, in [0, 1).
      eps: Added to the RMS; an absolute number, as in the paper. Updates whose RMS is near it or
        below are evened less.
      axis: Which vectors count as neurons: "output" the columns, as in the paper and the Dion
        repository; "long" the vectors that are counted along the longer side, as in modded-nanogpt
        and NVIDIA's code. They agree for fan_out >= fan_in.

    Returns:
      A transformation; a zero matrix gives exactly zero and the result is finite for finite input.
      State: `NormalizeNeuronsState`, one number per neuron (4 / fan_in bytes per parameter).
      Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      ValueError: If `decay` is outside [0, 1), `eps` is negative or `axis` is unknown; at `init` or
        `update` for a leaf of fewer than two axes.
      TypeError: If `decay` or `eps` is no number; for an integer leaf.

    Example:
      >>> tx = normalize_neurons(decay=0.0)
      >>> uneven = jnp.array([[3.0, 4.0, 0.0]])
      >>> updates, _ = tx.update(uneven, tx.init(uneven))
      >>> print((updates / updates.max()).round(3))
      [[1. 1. 0.]]

    Reference:
      Li et al., NorMuon, 2025, <https://arxiv.org/abs/2510.05491>, Algorithm 1.
    """
    check_number("normalize_neurons", "decay", decay, "lie in [0, 1)", lambda d: 0 <= d < 1)
    check_number("normalize_neurons", "eps", eps, "be at least 0", lambda e: e >= 0)
    if axis not in _AXES:
        raise ValueError(f"normalize_neurons: axis must be one of {_AXES}, got {axis!r}.")

    def rms_of_neurons(x: jax.Array) -> jax.Array:
        over = -1 if axis == "long" and x.shape[-2] > x.shape[-1] else -2
        scaled, scale = unit_max(x)
        squares = jnp.sum(jnp.square(jnp.abs(scaled)), axis=over, keepdims=True)
        return scale * jnp.sqrt(squares / max(1, x.shape[over]))

    def init(params: Any) -> NormalizeNeuronsState:
        def zeros(x: Any) -> jax.Array:
            if isinstance(x, jax.ShapeDtypeStruct):
                shape = jax.eval_shape(rms_of_neurons, x)
                return jnp.zeros(shape.shape, shape.dtype)
            return rms_of_neurons(jnp.zeros_like(x))

        return NormalizeNeuronsState(map_matrices("normalize_neurons", zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def accumulate(x: jax.Array, rms: jax.Array) -> jax.Array:
            # The root of decay * rms**2 + (1 - decay) * new**2, without squares that overflow.
            old, new = jnp.sqrt(decay) * rms, jnp.sqrt(1 - decay) * rms_of_neurons(x)
            return jnp.hypot(old, new).astype(rms.dtype)

        def evened(x: jax.Array, rms: jax.Array) -> jax.Array:
            divided = x / (rms + eps)
            before, after = frobenius_norm(x), frobenius_norm(divided)
            restored = divided * jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 0)
            return restored.astype(x.dtype)

        rms = map_matrices("normalize_neurons", accumulate, updates, state.rms)
        return jax.tree.map(evened, updates, rms), NormalizeNeuronsState(rms)

    return optax.GradientTransformation(init, update)
