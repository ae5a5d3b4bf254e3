"""Hybrid-AuON: AuON after a step or two of Newton-Schulz."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.each_matrix import chain
from orthax.linalg import newton_schulz
from orthax.linalg.coefficients import MUON
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import (
    adam_step,
    decay_step,
    fallback_chain,
    momentum_step,
    rate_step,
)
from orthax.transforms.cosh import scale_by_cosh_rms
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.shape_scale import scale_by_adam_rms


def hybrid_auon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    *,
    gamma: jax.typing.ArrayLike = 1.0,
    steps: int = 1,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(direction="unit_norm"),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hybrid-AuON: one step of Newton-Schulz, and AuON's brake.

    Newton-Schulz steps of Muon's triple on the momentum, then `orthax.scale_by_cosh_rms` of the
    result, whose norm stays: as in paper and repository. One step leaves a matrix far from
    orthogonal: a singular value that was r of the Frobenius norm is about 3.44 r, and the norm
    lies between 0.70 (rank one) and 3.44 (many small singular values).

    Args:
      learning_rate: Number or schedule. With the default shape scale updates have 0.2 times that
        norm as RMS, up to 3.4 times AdamW's: AdamW's rates have to be lowered.
      momentum: A number in [0, 1), or a transformation; its scale does not matter.
      gamma: Factor in the cosh, at least 0.
      steps: Number of Newton-Schulz steps, at least 1; the paper's is 1, the repository's 5. In
        `optax.inject_hyperparams`, list it in `static_args`.
      shape_scale: Transformation of matrices. The default is for a direction of about unit norm;
        after five steps the direction is nearly orthogonal and `scale_by_adam_rms()` fits. The
        repository's update is `gamma=1.5, shape_scale=optax.identity()`.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and keep their sharding.
      State: Muon's.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.muon`, and for a `gamma` or `steps` out of range.
      TypeError: As `orthax.muon`, and for `steps` that are no integer.

    Reference: Maity, AuON, 2025, <https://arxiv.org/abs/2509.24320>.
    """
    steps = check.integer("hybrid_auon: steps", steps)
    check.number("hybrid_auon: gamma", gamma, "[0, inf)")
    check.transformation("hybrid_auon: shape_scale", shape_scale)
    trace = momentum_step("hybrid_auon", momentum, nesterov, mu_dtype)
    iteration = orthogonalize(newton_schulz, coefficients=MUON[:1] * steps)
    # The brake of the published code: the iteration's result is not normalised again.
    direction = chain(iteration, scale_by_cosh_rms(gamma, "code"), shape_scale)
    adam = adam_step(mu_dtype)
    decay = decay_step("hybrid_auon", weight_decay)
    rate = rate_step("hybrid_auon", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        return optax.chain(trace, leaves(direction), leaves.masked(decay, mask), rate)

    rest = fallback_chain("hybrid_auon", fallback, adam, decay, mask, rate)
    return partition("hybrid_auon", matrices, rest, dimension_numbers, sharding)
