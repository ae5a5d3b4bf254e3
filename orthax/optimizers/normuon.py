"""NorMuon: Muon whose neurons take steps of even size."""

from typing import Any

import jax
import optax

from orthax.matrices import as_matrices
from orthax.optimizers._pieces import check_transformation, matrix_optimizer, momentum_trace
from orthax.transforms import normalize_neurons, orthogonalize, scale_by_adam_rms


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    decay: jax.typing.ArrayLike = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    orthogonalizer: optax.GradientTransformation = orthogonalize(),
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon, a drop-in for `optax.adamw(learning_rate)`.

    Muon with `orthax.normalize_neurons(decay)` between orthogonalisation and shape scale. It
    differs from Muon where orthogonalisation leaves neurons uneven: in matrices with more neurons
    than inputs.

    Args:
      learning_rate: Number or schedule. With the default shape scale, AdamW's values carry over.
      momentum: As in `orthax.muon`.
      decay: Decay of the per-neuron second moment, in [0, 1).
      nesterov: As in `orthax.muon`, and so are all that follow.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.
      orthogonalizer: Transformation of matrices.
      shape_scale: Transformation of matrices. `scale_by_width` is the official code's,
        `scale_to_rms` the paper's.
      fallback: Transformation for all other leaves.
      dimension_numbers: Which leaves are matrices and how.
      mu_dtype: Dtype of the momentum.

    Returns:
      The optimizer; updates have the gradients' dtype and sharding.
      State: Muon's and one number per neuron.

    Raises:
      ValueError: As `orthax.muon`, and for `decay` outside [0, 1).
      TypeError: As `orthax.muon`.

    Example:
      >>> import jax.numpy as jnp, orthax
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
      >>> optimizer = orthax.normuon(1e-3)
      >>> updates, state = optimizer.update(params, optimizer.init(params))

    Reference:
      Li et al., NorMuon, 2025, <https://arxiv.org/abs/2510.05491>.
    """
    check_transformation("normuon", "orthogonalizer", orthogonalizer)
    check_transformation("normuon", "shape_scale", shape_scale)
    direction = optax.chain(orthogonalizer, normalize_neurons(decay), shape_scale)
    return matrix_optimizer(
        "normuon",
        momentum_trace("normuon", momentum, nesterov, mu_dtype),
        as_matrices(direction, dimension_numbers),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        dimension_numbers=dimension_numbers,
        mu_dtype=mu_dtype,
    )
