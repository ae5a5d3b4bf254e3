"""Muon: momentum, orthogonalised."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.block_periodic import block_periodic
from orthax.base.each_matrix import chain
from orthax.matrices.partition import DecidedLeaves, partition
from orthax.optimizers.parts import (
    adam_step,
    decay_step,
    fallback_chain,
    momentum_step,
    rate_step,
)
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.shape_scale import scale_by_adam_rms


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation = 0.95,
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
    whole_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon, called as `optax.adamw(learning_rate)` is.

    For each matrix :math:`M \leftarrow \mu M + G`, then
    :math:`W \leftarrow W - \eta \, (s \, \mathrm{polar}(G + \mu M) + \lambda W)` with the shape
    scale s. All other leaves (biases, norms, embeddings, output heads) go to the fallback;
    `orthax.explain(params)` shows which.

    Args:
      learning_rate: Number or schedule. Of AdamW's best value try a quarter, 1 and 4 times: best
        were 4 times for GPTs, 1 for a ViT, 1/8 for a small MLP and CNN
        (benchmarks/learning_rates.py).
      momentum: A number in [0, 1) for `optax.trace`, or a transformation taken as it is.
      nesterov: Whether a number `momentum` looks ahead, as Keller Jordan's code does.
      weight_decay: Decoupled decay, multiplied by the learning rate: a number, a schedule, or a
        transformation in the place of `optax.add_decayed_weights`. The default fallback has it too.
        With the Python number 0 `update` needs no params.
      mask: Which leaves decay, as in `optax.masked`: a tree of bools, or a callable to one that
        sees the whole tree.
      orthogonalizer: Transformation of matrices, `orthax.orthogonalize(...)`.
      shape_scale: Transformation of matrices: `scale_by_adam_rms` (update RMS 0.2),
        `scale_by_width` (the original Muon; learning rates near 0.02), `scale_by_unit_rms`,
        `scale_to_rms`.
      fallback: Transformation for all other leaves. None: AdamW with the same learning rate, decay
        and mask, and optax's default moments.
      dimension_numbers: Which leaves are matrices and how: see `orthax.as_matrices`.
      mu_dtype: Dtype of the momentum, and of the default fallback's first moment. None: the
        params'; float32 for float16. In `optax.inject_hyperparams`, list it in `static_args`. The
        string "int8" keeps the momentum in a byte an entry, levels between the ends of each row of
        the leaf's last axis, and the fallback in full. On a GPT's own gradients the directions of
        8-bit and exact momentum have a cosine of 0.95, 0.84, 0.81, 0.93 after 1, 10, 30, 100 steps
        (stochastic rounding: 0.92, 0.78, 0.74, 0.89; 4 bits: 0.47, 0.34, 0.31, 0.44;
        benchmarks/momentum_bits.py); its final loss is 0.006 higher in the mean of three seeds,
        which differ by 0.012 among themselves.
      sharding: On a mesh each matrix travels to one device and back. None: how leaves are cut is
        read from their types or, on Auto axes under `jax.jit`, left to the compiler. A tree of
        shardings like the params, such as `jax.tree.map(lambda x: x.sharding, params)`, or a
        function of params to one, tells it there; see `orthax.orthogonalize`. False: nothing moves.
      whole_every: Of so many updates one is of whole matrices, which travel; at the others each
        device orthogonalises and scales its piece alone and sends nothing (MuonBP). None: all are
        of whole matrices, and equal on any mesh. Needs Explicit axes or `sharding`.

    Returns:
      The optimizer; updates have the wider dtype of gradients and params, and keep their sharding.
      State: one momentum per matrix (4 bytes a parameter in float32), two moments per other
        parameter.

    Complex leaves need the conjugate of `jax.grad`: a real loss falls along `-conj(grad)`.

    Raises:
      ValueError: For an argument out of range; at `init`, for a leaf whose axes are undecided; at
        `update`, if decay needs params that are not given.
      TypeError: For an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, orthax
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
      >>> optimizer = orthax.muon(1e-3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state)
      >>> params = optax.apply_updates(params, updates)

    Reference: Jordan et al., Muon, 2024, <https://kellerjordan.github.io/posts/muon/>; the default
      shape scale from Liu et al., 2025, <https://arxiv.org/abs/2502.16982>.
    """
    check.transformation("muon: orthogonalizer", orthogonalizer)
    check.transformation("muon: shape_scale", shape_scale)
    trace = momentum_step("muon", momentum, nesterov, mu_dtype)
    direction = chain(orthogonalizer, shape_scale)  # of matrices
    if whole_every is not None and check.integer("muon: whole_every", whole_every) > 1:
        direction = block_periodic("muon", direction, whole_every)
    adam = adam_step(mu_dtype)
    decay = decay_step("muon", weight_decay)
    rate = rate_step("muon", learning_rate)

    def matrices(leaves: DecidedLeaves) -> optax.GradientTransformation:
        # M <- mu M + G in the leaf's own shape; s polar(M) of its matrices; + lambda W; times -eta
        return optax.chain(trace, leaves(direction), leaves.masked(decay, mask), rate)

    rest = fallback_chain("muon", fallback, adam, decay, mask, rate)
    return partition("muon", matrices, rest, dimension_numbers, sharding)
