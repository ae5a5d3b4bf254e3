"""NorMuon: Muon whose neurons take steps of even size."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.each_matrix import chain
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import (
    adam_step,
    decay_step,
    fallback_chain,
    momentum_step,
    rate_step,
)
from orthax.transforms.normalize import normalize_neurons
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.shape_scale import scale_by_adam_rms


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    decay: jax.typing.ArrayLike = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    orthogonalizer: optax.GradientTransformation = orthogonalize(),
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon, called as `optax.adamw(learning_rate)` is.

    Muon with `orthax.normalize_neurons(decay)` between orthogonalisation and shape scale. It
    differs from Muon where orthogonalisation leaves neurons uneven: in matrices with more neurons
    than inputs.

    Args:
      decay: Decay of the per-neuron second moment, in [0, 1).
      shape_scale: Transformation of matrices. `scale_by_width` is the official code's,
        `scale_to_rms` the paper's.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and keep their sharding.
      State: Muon's and one number per neuron.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.muon`, and for `decay` outside [0, 1); TypeError: as `orthax.muon`.

    Reference: Li et al., NorMuon, 2025, <https://arxiv.org/abs/2510.05491>.
    """
    check.number("normuon: decay", decay, "[0, 1)")
    check.transformation("normuon: orthogonalizer", orthogonalizer)
    check.transformation("normuon: shape_scale", shape_scale)
    trace = momentum_step("normuon", momentum, nesterov, mu_dtype)
    # Algorithm 1: orthogonalised momentum, its neurons evened, and the size of a step.
    direction = chain(orthogonalizer, normalize_neurons(decay), shape_scale)
    adam = adam_step(mu_dtype)
    weights_decay = decay_step("normuon", weight_decay)
    rate = rate_step("normuon", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        return optax.chain(trace, leaves(direction), leaves.masked(weights_decay, mask), rate)

    rest = fallback_chain("normuon", fallback, adam, weights_decay, mask, rate)
    return partition("normuon", matrices, rest, dimension_numbers, sharding)
