"""On Auto axes of a mesh: how one array lies decides how another one does, and not the reverse.

The compiler passes on how arrays are cut from operand to result and back. A leaf that becomes part
of a stack would then be cut as its neighbours there are.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir


def forward(x: jax.Array) -> jax.Array:
    """`x`: how it is cut decides how the result is."""
    return _ONE_WAY.bind(x, to="FORWARD")


def backward(x: jax.Array) -> jax.Array:
    """`x`: how the result is cut decides how it is."""
    return _ONE_WAY.bind(x, to="BACKWARD")


def _lowered(context: Any, x: Any, *, to: str) -> list[Any]:  # noqa: ARG001 as JAX calls it
    if not jax.config.jax_use_shardy_partitioner:  # pyright: ignore[reportAttributeAccessIssue]
        return [x]
    return [sdy.propagation_barrier(x, getattr(sdy.PropagationDirection, to))]


def _transposed(cotangent: Any, *, to: str) -> list[Any]:  # noqa: ARG001 as JAX calls it
    return [cotangent]


_ONE_WAY = Primitive("one_way")
_ONE_WAY.def_impl(lambda x, to: x)  # noqa: ARG005 as JAX calls it
_ONE_WAY.def_abstract_eval(lambda x, to: x)  # noqa: ARG005 as JAX calls it
mlir.register_lowering(_ONE_WAY, _lowered)
ad.deflinear(_ONE_WAY, _transposed)
batching.defvectorized(_ONE_WAY)
