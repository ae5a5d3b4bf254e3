"""ROOT: Muon on a momentum whose outliers are clipped."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.each_matrix import chain
from orthax.linalg import coefficients, newton_schulz
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import (
    adam_step,
    decay_step,
    fallback_chain,
    momentum_step,
    rate_step,
)
from orthax.transforms.clip import clip_by_quantile
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.shape_scale import scale_by_adam_rms


def root(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    *,
    quantile: jax.typing.ArrayLike = 0.9,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    orthogonalizer: optax.GradientTransformation = orthogonalize(
        newton_schulz, coefficients=coefficients.for_shape
    ),
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ROOT, called as `optax.adamw(learning_rate)` is.

    Muon with `orthax.clip_by_quantile(quantile)` before orthogonalisation, whose result then does
    not turn towards a few huge entries, and a Newton-Schulz table for each matrix shape. Clipping
    distorts momentum without outliers too: `quantile=1` leaves it out.

    Args:
      quantile: Part of each matrix's entries that are not clipped, in [0, 1].
      orthogonalizer: Transformation of matrices. The default fits the step table to each shape,
        which is what the paper's AdaNewton does.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and keep their sharding.
      State: Muon's.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.muon`, and for `quantile` outside [0, 1]; TypeError: as `orthax.muon`.

    Reference: He et al., ROOT, 2025, <https://arxiv.org/abs/2511.20626>.
    """
    check.number("root: quantile", quantile, "[0, 1]")
    check.transformation("root: orthogonalizer", orthogonalizer)
    check.transformation("root: shape_scale", shape_scale)
    trace = momentum_step("root", momentum, nesterov, mu_dtype)
    # What soft thresholding takes off the momentum is left to be orthogonalised.
    direction = chain(clip_by_quantile(quantile), orthogonalizer, shape_scale)
    adam = adam_step(mu_dtype)
    decay = decay_step("root", weight_decay)
    rate = rate_step("root", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        return optax.chain(trace, leaves(direction), leaves.masked(decay, mask), rate)

    rest = fallback_chain("root", fallback, adam, decay, mask, rate)
    return partition("root", matrices, rest, dimension_numbers, sharding)
