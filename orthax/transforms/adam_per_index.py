"""`scale_by_adam_per_index`: Adam whose bias correction knows the age of every projected index."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax._numbers import check_number
from orthax.transforms._float16 import accumulate_float16_in_float32
from orthax.transforms._frames import projected_axis
from orthax.transforms._trees import check_matrix_leaves, map_matrices


class ScaleByAdamPerIndexState(NamedTuple):
    """State of `scale_by_adam_per_index`.

    Attributes:
      mu: First moment, like the updates.
      nu: Second moment, like the updates, real.
      mu_weight: Sum of the weights that went into each index of `mu`, 1 - b1**age: shape of the
        updates, with 1 for every axis but the index's; float32 for 16-bit updates.
      nu_weight: The same of `nu`, 1 - b2**age.
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
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam for `low_rank`, with an age for each index of the shorter axis.

    :math:`\mu / (1 - \beta_1^{t_j})` over :math:`\sqrt{\nu / (1 - \beta_2^{t_j})} + \epsilon`
    with the age :math:`t_j` of index j: its number of updates since `low_rank` took it in. An index
    that comes late starts like the first ones, with a step of 1; with one count for all, its first
    step would be :math:`(1 - \beta_1) / \sqrt{1 - \beta_2} = 3.2`. Where no index ever changes, it
    is `optax.scale_by_adam`.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      mu_dtype: Dtype of the first moment. None: the update's; float32 for float16.

    Returns:
      A transformation.
      State: `ScaleByAdamPerIndexState`, two numbers per entry and two per index.
      Sees: trees whose leaves' last two axes are (..., m, r) or (..., r, n), the indices along the
        shorter (rows of a square matrix), as `low_rank` makes them; needs no params.

    Raises:
      ValueError: If `b1` or `b2` is outside [0, 1) or `eps` negative; at `init` or `update`, for a
        leaf of fewer than two axes.
      TypeError: If one is no number; for an integer leaf.

    Example:
      >>> tx = scale_by_adam_per_index()
      >>> g = jnp.array([[4.0, -0.1], [3.0, 0.2], [0.0, 0.5]])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates.round(3))
      [[ 1. -1.]
       [ 1.  1.]
       [ 0.  1.]]

    Reference:
      Kingma and Ba, Adam, 2014, <https://arxiv.org/abs/1412.6980>.
    """
    call = "scale_by_adam_per_index"
    check_number(call, "b1", b1, "lie in [0, 1)", lambda b: 0 <= b < 1)
    check_number(call, "b2", b2, "lie in [0, 1)", lambda b: 0 <= b < 1)
    check_number(call, "eps", eps, "be at least 0", lambda e: e >= 0)

    def weight(x: jax.Array) -> jax.Array:
        other = -1 if projected_axis(x.shape) == -2 else -2
        wide = x.real.astype(jnp.promote_types(x.real.dtype, jnp.float32))
        return jnp.sum(wide, axis=other, keepdims=True)

    def init(params: Any) -> ScaleByAdamPerIndexState:
        def zeros(fun: Any) -> Any:
            def of_leaf(x: Any) -> jax.Array:
                if isinstance(x, jax.ShapeDtypeStruct):
                    x = jnp.zeros(x.shape, x.dtype, device=x.sharding)
                return fun(jnp.zeros_like(x))

            return map_matrices(call, of_leaf, params)

        return ScaleByAdamPerIndexState(
            mu=zeros(lambda x: x.astype(mu_dtype or x.dtype)),
            nu=zeros(lambda x: x.real),
            mu_weight=zeros(weight),
            nu_weight=zeros(weight),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        check_matrix_leaves(call, updates)
        moment = optax.tree.update_moment
        ones = optax.tree.ones_like(state.mu_weight)
        new = ScaleByAdamPerIndexState(
            mu=moment(updates, state.mu, b1, 1),
            nu=optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2),
            mu_weight=moment(ones, state.mu_weight, b1, 1),
            nu_weight=moment(ones, state.nu_weight, b2, 1),
        )

        def direction(g: Any, mu: Any, nu: Any, mu_weight: Any, nu_weight: Any) -> jax.Array:
            return (mu / mu_weight / (jnp.sqrt(nu / nu_weight) + eps)).astype(g.dtype)

        results = jax.tree.map(direction, updates, *new)
        return results, jax.tree.map(lambda x, like: x.astype(like.dtype), new, state)

    return accumulate_float16_in_float32(optax.GradientTransformation(init, update))
