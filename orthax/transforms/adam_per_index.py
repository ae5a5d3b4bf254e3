"""`scale_by_adam_per_index`: Adam whose bias correction knows the age of every projected index."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import each_matrix
from orthax.base.leaves import keep_dtypes
from orthax.base.placing import resized_zeros, zeros_like
from orthax.linalg.elementary import abs_square, divided, number_for, root, wide, wide_dtype
from orthax.transforms.low_rank.frames import projected_axis


class ScaleByAdamPerIndexState(NamedTuple):
    """State of `scale_by_adam_per_index`.

    Attributes:
      mu: First moment, like the updates; `nu`: second, real.
      mu_weight: Sum of the weights that went into each index of `mu`, 1 - b1**age, with one entry
        along the other axis; float32 for 16-bit updates. `nu_weight`: the same of `nu`.
    """

    mu: optax.Updates
    nu: optax.Updates
    mu_weight: optax.Updates
    nu_weight: optax.Updates


def scale_by_adam_per_index(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Adam for `low_rank`, with an age for each index of the shorter axis.

    :math:`\mu / (1 - \beta_1^{t_j})` over :math:`\sqrt{\nu / (1 - \beta_2^{t_j})} + \epsilon`
    with the age :math:`t_j` of index j, its number of updates since `low_rank` took it in. An index
    that comes late starts with a step of 1, like the first ones; with one count for all, it would
    be :math:`(1 - \beta_1) / \sqrt{1 - \beta_2} = 3.2`. Else it is `optax.scale_by_adam`.
    Reference: Kingma and Ba, Adam, 2014, <https://arxiv.org/abs/1412.6980>.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      eps_root: Added to the second moment, under the root: bounds the slope of the update where
        gradients pass through it (meta-learning). At a moment of zero it is finite without.
      mu_dtype: Dtype of the first moment. None: the update's; float32 for float16.

    Returns:
      A transformation. State: `ScaleByAdamPerIndexState`, two numbers per entry and two per index.
      Sees: trees whose leaves' last two axes are (..., m, r) or (..., r, n), the indices along the
        shorter (rows of a square matrix), as `low_rank` makes them; needs no params.

    Raises:
      ValueError: If `b1` or `b2` is outside [0, 1), `eps` or `eps_root` negative, `mu_dtype` not
        floating, or a leaf has fewer than two axes.
      TypeError: If one is no number; for an integer leaf.

    Example:
      >>> tx = scale_by_adam_per_index()
      >>> g = jnp.array([[4.0, -0.1], [3.0, 0.2], [0.0, 0.5]])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates.round(3))
      [[ 1. -1.]
       [ 1.  1.]
       [ 0.  1.]]
    """
    call = "scale_by_adam_per_index"
    check.number(f"{call}: b1", b1, "[0, 1)")
    check.number(f"{call}: b2", b2, "[0, 1)")
    check.number(f"{call}: eps", eps, "[0, inf)")
    check.number(f"{call}: eps_root", eps_root, "[0, inf)")
    check.floating_dtype(f"{call}: mu_dtype", mu_dtype)

    def start(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[jax.Array, ...]:
        # One number for each index, that is for each place along the projected axis.
        other = -1 if projected_axis(x.shape) == -2 else -2
        real = jnp.finfo(x.dtype).dtype
        weights = (resized_zeros(x, other, 1, wide_dtype(real)) for _ in range(2))
        return zeros_like(x, mu_dtype), zeros_like(x, real), *weights

    def scaled(
        g: Any, mu: Any, nu: Any, mu_weight: Any, nu_weight: Any, *numbers: Any
    ) -> tuple[Any, ...]:
        # Adam's moments (Kingma and Ba, Algorithm 1) and the weights that went into each of them:
        # `low_rank` sets both to zero for an index that it takes in, so it is as young as they say.
        g, mu, nu = wide(g), wide(mu), wide(nu)
        b1, b2, eps, eps_root = (number_for(g, number) for number in numbers)
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * abs_square(g) + b2 * nu
        mu_weight = (1 - b1) + b1 * mu_weight
        nu_weight = (1 - b2) + b2 * nu_weight
        size = root(nu / nu_weight + eps_root) + eps
        direction = divided(mu / mu_weight.astype(mu.dtype), size)
        return direction, mu, nu, mu_weight, nu_weight

    numbers = (b1, b2, eps, eps_root)
    kept = each_matrix(
        call, scaled, numbers=numbers, init=start, state_type=ScaleByAdamPerIndexState
    )
    return keep_dtypes(kept, matrices_of=call)
