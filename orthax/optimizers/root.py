"""ROOT: Muon on a momentum whose outliers are clipped."""

from typing import Any

import jax
import optax

from orthax.linalg import coefficients, newton_schulz
from orthax.matrices import as_matrices
from orthax.optimizers._pieces import check_transformation, matrix_optimizer, momentum_trace
from orthax.transforms import clip_by_quantile, orthogonalize, scale_by_adam_rms


def root(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    *,
    quantile: jax.typing.ArrayLike = 0.9,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    orthogonalizer: optax.GradientTransformation = orthogonalize(
        newton_schulz, coefficients=coefficients.for_shape
    ),
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ROOT, a drop-in for `optax.adamw(learning_rate)`.

    Muon with `orthax.clip_by_quantile(quantile)` before orthogonalisation, whose result then does
    not turn towards a few huge entries, and a Newton-Schulz table for each matrix shape. Clipping
    distorts momentum without outliers too: `quantile=1` leaves it out.

    Args:
      learning_rate: Number or schedule. With the default shape scale, AdamW's values carry over.
      momentum: As in `orthax.muon`.
      quantile: Part of each matrix's entries that are not clipped, in [0, 1].
      nesterov: As in `orthax.muon`, and so are all that follow.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.
      orthogonalizer: Transformation of matrices. The paper repeats one triple for each of a few
        shapes, `coefficients.ROOT`, and Muon's for all others.
      shape_scale: Transformation of matrices.
      fallback: Transformation for all other leaves.
      dimension_numbers: Which leaves are matrices and how.
      mu_dtype: Dtype of the momentum.

    Returns:
      The optimizer; updates have the gradients' dtype and sharding.
      State: Muon's.

    Raises:
      ValueError: As `orthax.muon`, and for `quantile` outside [0, 1].
      TypeError: As `orthax.muon`.

    Example:
      >>> import jax.numpy as jnp, orthax
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
      >>> optimizer = orthax.root(1e-3)
      >>> updates, state = optimizer.update(params, optimizer.init(params))

    Reference:
      He et al., ROOT, 2025, <https://arxiv.org/abs/2511.20626>.
    """
    check_transformation("root", "orthogonalizer", orthogonalizer)
    check_transformation("root", "shape_scale", shape_scale)
    direction = optax.chain(clip_by_quantile(quantile), orthogonalizer, shape_scale)
    return matrix_optimizer(
        "root",
        momentum_trace("root", momentum, nesterov, mu_dtype),
        as_matrices(direction, dimension_numbers),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        dimension_numbers=dimension_numbers,
        mu_dtype=mu_dtype,
    )
