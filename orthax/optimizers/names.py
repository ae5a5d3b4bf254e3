"""Optimizers by name, for configuration files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import optax

from orthax.base import check
from orthax.optimizers.auon import auon
from orthax.optimizers.dct_adamw import dct_adamw
from orthax.optimizers.hybrid_auon import hybrid_auon
from orthax.optimizers.muon import muon
from orthax.optimizers.normuon import normuon
from orthax.optimizers.root import root
from orthax.optimizers.trion import trion

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformationExtraArgs]] = MappingProxyType(
    {f.__name__: f for f in (auon, dct_adamw, hybrid_auon, muon, normuon, root, trion)}
)
"""All optimizers by name; each is called as `optax.adamw(learning_rate, ...)` is."""


def by_name(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Returns the optimizer that a configuration names, to be called with its settings.

    Args:
      name: One of `orthax.OPTIMIZERS`.

    Raises:
      ValueError: For another name; it lists them. TypeError: if `name` is no string.

    Example:
      >>> import orthax
      >>> config = {"optimizer": "normuon", "learning_rate": 3e-3, "weight_decay": 0.1}
      >>> optimizer = orthax.by_name(config.pop("optimizer"))(**config)
    """
    check.choice("by_name: name", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name]
