"""DCT-AdamW: AdamW whose moments live in a few columns of a cosine basis."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from orthax.base import check
from orthax.base.leaves import keep_dtypes
from orthax.linalg.quantization import BITS
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import QUARTER, adam_step, decay_step, fallback_chain, rate_step
from orthax.transforms.adam_per_index import scale_by_adam_per_index
from orthax.transforms.low_rank.projection import projected


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float | Callable[[int, int], int] | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    error_feedback: bool = False,
    basis: Literal["dct", "dct3", "random", "hadamard", "columns", "svd", "subspace"] = "dct",
    ranking: Literal["l1", "l2"] = "l2",
    update_every: int = 1,
    bias_correction: Literal["per_index", "global"] = "per_index",
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = None,
    mu_dtype: Any = None,
    buffer_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DCT-AdamW, called as `optax.adamw(learning_rate)` is, with r / min(m, n) of its moments.

    For each matrix :math:`A = (G + E) Q_r` are the coordinates of the gradient in the r columns of
    a cosine basis where they are largest, and :math:`W \leftarrow W - \eta \, (\mathrm{Adam}(A)
    Q_r^T + \lambda W)`. When the columns change, the moments of those that stay move with them.

    Args:
      learning_rate: Number or schedule; AdamW's values are a good start.
      rank: Dimensions r, as in `orthax.low_rank`. None: a quarter of the shorter side.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      eps_root: Added under the root, of the fallback too; see `orthax.scale_by_adam_per_index`.
      error_feedback: Whether what was left out is added to the next gradient, :math:`E = G + E - A
        Q_r^T`, for a buffer of the parameters' size; otherwise it is lost.
      basis: Of the projection; see `orthax.low_rank`, and for the two that follow. The paper's code
        uses "dct3".
      ranking: Norm by which columns are chosen.
      update_every: Updates between choices of the subspace.
      bias_correction: "per_index" knows how long each column has been in use; "global", the
        paper's, counts all updates, so that the first step of a new column is 3.2 times too long.
      fallback: Transformation for all other leaves; None: AdamW with the same arguments.
      mu_dtype: Dtype of first moments, or "int8": a byte an entry for those of matrices, in units
        of the second moment's root. In `optax.inject_hyperparams`, list it in `static_args`.
      buffer_dtype: Of the error feedback: None (the params'), a dtype, or "int8" or "int4" for so
        many bits an entry.

    All other arguments are as in `orthax.muon`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and on Explicit meshes
      their sharding.
      State: per matrix 2 r max(m, n) numbers, r indices and twice r weights; the error feedback.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: As `orthax.low_rank`, for unknown `bias_correction`, decays outside [0, 1).
      TypeError: As `orthax.low_rank`.

    Reference: Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>.
    """
    check.flag("dct_adamw: error_feedback", error_feedback)
    check.choice("dct_adamw: bias_correction", bias_correction, ("per_index", "global"))
    for argument, b in {"b1": b1, "b2": b2}.items():
        check.number(f"dct_adamw: {argument}", b, "[0, 1)")
    check.number("dct_adamw: eps", eps, "[0, inf)")
    check.number("dct_adamw: eps_root", eps_root, "[0, inf)")
    check.floating_dtype("dct_adamw: mu_dtype", mu_dtype, names=("int8",))
    quantised = isinstance(mu_dtype, str) and mu_dtype == "int8"
    moment_dtype = None if quantised else mu_dtype
    per_index = scale_by_adam_per_index(b1, b2, eps, eps_root=eps_root, mu_dtype=moment_dtype)
    adam = adam_step(moment_dtype, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    low_rank = projected(
        "dct_adamw",
        per_index if bias_correction == "per_index" else keep_dtypes(adam),
        QUARTER if rank is None else rank,
        basis=basis,
        ranking=ranking,
        retain=0.0 if error_feedback else None,
        update_every=update_every,
        buffer_dtype=buffer_dtype,
        mu_bits=BITS["int8"] if quantised else None,
    )
    decay = decay_step("dct_adamw", weight_decay)
    rate = rate_step("dct_adamw", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        # Where Muon has its momentum, so that the states of both are alike.
        return optax.chain(optax.identity(), leaves(low_rank), leaves.masked(decay, mask), rate)

    rest = fallback_chain("dct_adamw", fallback, adam, decay, mask, rate)
    return partition("dct_adamw", matrices, rest, dimension_numbers)
