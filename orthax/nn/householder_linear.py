"""`HouseholderLinear`: a layer whose kernel is orthogonal by construction."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from orthax import linalg
from orthax.base import check
from orthax.base.leaves import check_array, value_of

_CALL = "orthax.nn.HouseholderLinear"


class HouseholderLinear(nnx.Module):
    r"""Linear layer whose kernel is orthogonal throughout training, with any optimizer.

    For layers that must not stretch or shrink what passes: deep or recurrent stacks, adapters. The
    kernel is built from Householder reflections (`orthax.linalg.householder_product`), whose
    directions are the parameters: no penalty or projection is needed. Without `rank` it has
    orthonormal columns, or rows where there are more outputs than inputs. With `rank` it is the
    low-rank orthogonal projector: k directions are carried isometrically, the rest to zero.

    A square kernel of full rank keeps its determinant, :math:`(-1)^k`: it is a rotation or, for odd
    k, one with a reflection. `from_kernel` gives it the sign of the trained kernel's.

    Only the directions count: gradients are orthogonal to them, so they grow under gradient descent
    and the effective learning rate falls. `orthax.muon` and others leave them to the fallback.
    Reference: Song et al., Householder Projector for Unsupervised Latent Semantics Discovery, 2023,
    <https://arxiv.org/abs/2307.08012>: rank 10, directions from a trained kernel.

    Attributes:
      input_reflectors: Directions on the side of the inputs, shape (in_features, k); None for a
        kernel of full rank with more outputs than inputs.
      output_reflectors: Those of the outputs, (out_features, k); None for full rank otherwise.
      bias: Shape (out_features,), or None.

    Args:
      in_features: Number of inputs; `out_features`: of outputs.
      rank: k, from 1 to min(in_features, out_features). None: all of it.
      use_bias: Whether to add a bias.
      dtype: Of the computation; None: of inputs and parameters. The kernel is in at least float32.
      param_dtype: Of the parameters.
      precision: Of the product with the inputs.
      reflector_init: Initializer of the directions. Normal numbers of any scale give the same
        distribution of kernels; the scale sets how fast they turn.
      bias_init: Initializer of the bias.
      rngs: Source of the parameters' key.

    Raises:
      ValueError: If `rank` is out of range or a size less than 1; TypeError: if one is no integer.

    Example:
      >>> layer = HouseholderLinear(5, 3, rngs=nnx.Rngs(0))
      >>> kernel = layer.kernel
      >>> bool(jnp.allclose(kernel.T @ kernel, jnp.eye(3), atol=1e-5))
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        reflector_init: jax.nn.initializers.Initializer = jax.nn.initializers.normal(0.05),
        bias_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        check.integer(f"{_CALL}: in_features", in_features)
        check.integer(f"{_CALL}: out_features", out_features)
        least = min(in_features, out_features)
        if rank is not None:
            check.integer(f"{_CALL}: rank", rank, f"[1, {least}]")
        check.flag(f"{_CALL}: use_bias", use_bias)
        check.floating_dtype(f"{_CALL}: dtype", dtype)
        check.floating_dtype(f"{_CALL}: param_dtype", param_dtype, kind=jnp.floating, none=False)
        check.function(f"{_CALL}: reflector_init", reflector_init, "an initializer")
        check.function(f"{_CALL}: bias_init", bias_init, "an initializer")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.dtype, self.precision = dtype, precision

        def reflectors(features: int) -> nnx.Param:
            k = least if rank is None else rank
            return nnx.Param(reflector_init(rngs.params(), (features, k), param_dtype))

        # A kernel of full rank needs one set of reflections only, on the longer side: its first
        # columns there are orthonormal. One of lower rank needs a set for each side.
        on_inputs = rank is not None or in_features >= out_features
        on_outputs = rank is not None or in_features < out_features
        self.input_reflectors = nnx.data(reflectors(in_features) if on_inputs else None)
        self.output_reflectors = nnx.data(reflectors(out_features) if on_outputs else None)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    @property
    def kernel(self) -> jax.Array:
        """The kernel, shape (in_features, out_features), in the dtype of the parameters."""
        # Which of the two there are says the form: a projector, a tall or a wide kernel.
        ins, outs = self.input_reflectors, self.output_reflectors
        if ins is not None and outs is not None:
            return linalg.householder_projector(ins[...], outs[...])
        if ins is not None:
            return linalg.householder_product(ins[...], self.out_features)
        assert outs is not None
        return linalg.householder_product(outs[...], self.in_features).T

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to the last axis of the inputs."""
        # The kernel is built in the dtype of the parameters and only then rounded to `dtype`.
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = promote_dtype((inputs, self.kernel, bias), dtype=self.dtype)
        outputs = jnp.matmul(inputs, kernel, precision=self.precision)
        if bias is None:
            return outputs
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))

    @classmethod
    def from_kernel(
        cls, kernel: jax.Array, bias: jax.Array | None = None, rank: int | None = None
    ) -> "HouseholderLinear":
        """The layer whose kernel is nearest to a trained one.

        Args:
          kernel: Shape (in_features, out_features), real floating.
          bias: Shape (out_features,), or None.
          rank: Of the layer. The leading singular vectors stay; singular values become 1.

        Returns:
          A layer with parameters in the dtypes of `kernel` and `bias`. Its outputs differ from the
          trained layer's by as much as the singular values did from 1.

        Raises:
          ValueError: If `kernel` has not two axes, `bias` does not fit or `rank` is out of range.
          TypeError: If `kernel` is not real floating, or `rank` no integer.

        Example:
          >>> layer = HouseholderLinear.from_kernel(jnp.array([[0.0, 2.0], [0.5, 0.0]]))
          >>> print(layer.kernel.round(5) + 0.0)
          [[0. 1.]
           [1. 0.]]
        """
        call, kernel, bias = f"{_CALL}.from_kernel", value_of(kernel), value_of(bias)
        check_array(call, kernel, "kernel", kind=jnp.floating)
        if kernel.ndim != 2:
            raise ValueError(f"{call}: kernel must have two axes, got shape {kernel.shape}.")
        if bias is not None:
            check_array(call, bias, "bias", kind=jnp.floating)
            if bias.shape != kernel.shape[1:]:
                shape = kernel.shape[1:]
                raise ValueError(f"{call}: bias must have shape {shape}, got {bias.shape}.")
        if rank is not None:
            check.integer(f"{call}: rank", rank, f"[1, {min(kernel.shape)}]")
        # The layer is made with random directions, which those of the trained kernel replace.
        settings = {"use_bias": bias is not None, "param_dtype": kernel.dtype}
        layer = cls(*kernel.shape, rank=rank, rngs=nnx.Rngs(0), **settings)
        if rank is not None:
            ins, outs = linalg.householder_factors(kernel, rank)
        else:
            # rtol=0 keeps directions of tiny singular values, or columns would not be orthonormal.
            nearest = linalg.polar_svd(kernel, rtol=0)
            tall = kernel.shape[0] >= kernel.shape[1]
            ins, outs = linalg.householder_vectors(nearest if tall else nearest.T), None
            ins, outs = (ins, outs) if tall else (outs, ins)
        layer.input_reflectors = nnx.data(None if ins is None else nnx.Param(ins))
        layer.output_reflectors = nnx.data(None if outs is None else nnx.Param(outs))
        layer.bias = nnx.data(None if bias is None else nnx.Param(jnp.asarray(bias)))
        return layer
