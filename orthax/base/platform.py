"""Choosing functions by the platform a program is lowered for, not by the one that traces it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from orthax.base.leaves import vary_as

GPUS = ("cuda", "rocm")


def by_platform(functions: Mapping[str, Callable[..., Any]], default: Callable[..., Any]) -> Any:
    """A function that does on each platform what the function named for it does.

    A program may be traced on one platform and run on another, by `jax.export` or a device that is
    not the default one. So all functions are traced, and lowering drops those of other platforms.
    Without `jax.jit` around, the platform is that of the default device: who is called so and must
    not depend on it puts a `jax.jit` around.

    Args:
      functions: By platform: "cpu", "tpu", "cuda", "rocm", or "gpu" for the last two.
      default: For all other platforms. All take the same arrays, and return arrays of the same
        shapes and dtypes.

    Returns:
      Function of these arrays.
    """
    named = {
        name: function
        for platform, function in functions.items()
        for name in (GPUS if platform == "gpu" else (platform,))
    }
    if all(function is default for function in named.values()):
        return default

    def chosen(*args: Any) -> Any:
        branches = {function: function for function in (*named.values(), default)}
        if jax.sharding.get_abstract_mesh().manual_axes:
            # What varies over the same devices has the same type: a constant would be of another.
            branches = {function: _varying(function) for function in branches}
        chosen = {name: branches[function] for name, function in named.items()}
        return jax.lax.platform_dependent(*args, default=branches[default], **chosen)

    return chosen


def _varying(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: vary_as(function(*args), args)
