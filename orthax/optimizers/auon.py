"""AuON: momentum of unit norm, braked by the root mean square of its cosh."""

from typing import Any, Literal

import jax
import optax

from orthax.base import check
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import (
    adam_step,
    decay_step,
    fallback_chain,
    momentum_step,
    rate_step,
)
from orthax.transforms.cosh import MODES, scale_by_cosh_rms
from orthax.transforms.shape_scale import scale_by_adam_rms


def auon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
    *,
    gamma: jax.typing.ArrayLike = 1.0,
    mode: Literal["paper", "code", "rms"] = "paper",
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(direction="unit_norm"),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AuON, called as `optax.adamw(learning_rate)` is.

    Momentum through `orthax.scale_by_cosh_rms(gamma, mode)`. Nothing is orthogonalised: the paper's
    is momentum of unit Frobenius norm, the repository's SGD with Nesterov momentum, both to within
    gamma**2 / (2 fan_in fan_out).

    Args:
      momentum: A number in [0, 1), or a transformation. With `mode="code"` a number is the decay of
        an average, as in the repository: the direction is `1 - momentum` times the trace.
      gamma: Factor in the cosh, at least 0.
      mode: As in `orthax.scale_by_cosh_rms`. "code" does not normalise: the repository's update is
        `mode="code", gamma=1.5, shape_scale=optax.identity()`, with learning rates near SGD's. In
        `optax.inject_hyperparams`, list it in `static_args`.
      shape_scale: Transformation of matrices. The default gives a direction of unit norm the RMS
        0.2 of Adam's updates; "rms" divides that by its R, 2.05 for normal entries at gamma 1.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and keep their sharding.
      State: Muon's.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.muon`, and for a `gamma` or `mode` out of range; TypeError: as there.

    Reference: Maity, AuON, 2025, <https://arxiv.org/abs/2509.24320>.
    """
    check.number("auon: gamma", gamma, "[0, inf)")
    check.choice("auon: mode", mode, MODES)
    check.transformation("auon: shape_scale", shape_scale)
    trace = momentum_step("auon", momentum, nesterov, mu_dtype)
    if mode == "code" and check.is_number(momentum):
        # The repository averages, so that its direction is 1 - momentum times the trace.
        trace = optax.chain(trace, optax.scale(1 - momentum))
    direction = optax.chain(scale_by_cosh_rms(gamma, mode), shape_scale)
    adam = adam_step(mu_dtype)
    decay = decay_step("auon", weight_decay)
    rate = rate_step("auon", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        return optax.chain(trace, leaves(direction), leaves.masked(decay, mask), rate)

    rest = fallback_chain("auon", fallback, adam, decay, mask, rate)
    return partition("auon", matrices, rest, dimension_numbers)
