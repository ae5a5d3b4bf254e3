"""Trion: Muon in a few dimensions, whose momentum keeps what is left out."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from orthax.base import check
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import QUARTER, adam_step, decay_step, fallback_chain, rate_step
from orthax.transforms.low_rank.projection import projected
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.shape_scale import scale_by_adam_rms


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float | Callable[[int, int], int] | None = None,
    momentum: jax.typing.ArrayLike = 0.95,
    *,
    basis: Literal["dct", "dct3", "random", "hadamard", "columns", "svd", "subspace"] = "dct",
    ranking: Literal["l1", "l2"] = "l2",
    update_every: int = 1,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    orthogonalizer: optax.GradientTransformation = orthogonalize(),
    shape_scale: optax.GradientTransformation = scale_by_adam_rms(),
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trion, called as `optax.adamw(learning_rate)` is.

    For each matrix :math:`M \leftarrow M + G`; :math:`A = M Q_r` are its coordinates in the r
    columns of a cosine basis where they are largest; :math:`W \leftarrow W - \eta \, (s \,
    \mathrm{polar}(A) Q_r^T + \lambda W)`; and only what was used decays, :math:`M \leftarrow M -
    (1 - \mu) A Q_r^T`. Orthogonalising costs r / min(m, n) of Muon's work. At full rank it is Muon
    without Nesterov momentum.

    Args:
      learning_rate: Number or schedule. With the default shape scale an update of rank r has RMS
        0.2 sqrt(r / min(fan_in, fan_out)): less than AdamW's, so the best rate is larger.
      rank: Dimensions r, as in `orthax.low_rank`. None: a quarter of the shorter side.
      momentum: A number in [0, 1).
      basis: Of the projection; see `orthax.low_rank`, and for the two that follow. The paper's code
        uses "dct3" for fan_in <= fan_out and "dct" for all others.
      ranking: Norm by which columns are chosen; the paper's code uses "l1".
      update_every: Updates between choices of the subspace.
      orthogonalizer: Transformation of matrices, here of rank r.
      mu_dtype: Dtype of the momentum, or "int8" or "int4" for so many bits an entry.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and on Explicit meshes
      their sharding.
      State: Muon's, and r indices per matrix.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.muon` and `orthax.low_rank`; TypeError: as these.

    Reference: Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>, Algorithm 1.
    """
    check.number("trion: momentum", momentum, "[0, 1)")
    check.transformation("trion: orthogonalizer", orthogonalizer)
    check.transformation("trion: shape_scale", shape_scale)
    # Algorithm 1: the buffer of low_rank is the momentum, and what was used of it decays.
    low_rank = projected(
        "trion",
        orthogonalizer,
        QUARTER if rank is None else rank,
        basis=basis,
        ranking=ranking,
        retain=momentum,
        update_every=update_every,
        buffer_dtype=mu_dtype,
        buffer_argument="mu_dtype",
    )
    direction = optax.chain(low_rank, shape_scale)
    adam = adam_step()
    decay = decay_step("trion", weight_decay)
    rate = rate_step("trion", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        # Where Muon has its momentum, so that the states of both are alike.
        return optax.chain(optax.identity(), leaves(direction), leaves.masked(decay, mask), rate)

    rest = fallback_chain("trion", fallback, adam, decay, mask, rate)
    return partition("trion", matrices, rest, dimension_numbers)
