"""How leaves are read as matrices, and how what a device has of them becomes a stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from orthax.base.exchange import Cuts

Entries = tuple[Any, ...]
"""Of a `PartitionSpec`: for each axis of an array None, a mesh axis, or a tuple of such."""


class Reading(Protocol):
    """How a leaf is read as matrices: the views of `orthax.matrices`, or `AsItIs`."""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes that count matrices."""
        ...

    def of_stack(self, rest: tuple[int, ...]) -> "Reading":
        """The reading of a stack (k, *rest), whose axes but the first are those of one matrix."""
        ...

    def opened(self, x: jax.Array) -> Any:
        """The leaf as matrices (*batch, m, n), or a tuple of such."""
        ...

    def closed(self, y: Any) -> jax.Array:
        """Undoes `opened`."""
        ...

    def opened_spec(self, entries: Entries) -> Any:
        """A `PartitionSpec` for each array that the leaf opens to."""
        ...

    def opened_cuts(self, cuts: Cuts) -> Cuts | None:
        """How rows and columns are cut, if each device can open its own piece of a leaf."""
        ...


@dataclasses.dataclass(frozen=True)
class AsItIs:
    """The reading of a leaf whose last two axes are the matrix."""

    batch_axes: tuple[int, ...]

    def of_stack(self, rest: tuple[int, ...]) -> "AsItIs":  # noqa: ARG002 as in the protocol
        """The same for a stack."""
        return AsItIs((0,))

    def opened(self, x: jax.Array) -> jax.Array:
        """The leaf."""
        return x

    def closed(self, y: jax.Array) -> jax.Array:
        """The leaf."""
        return y

    def opened_spec(self, entries: Entries) -> PartitionSpec:
        """Its own."""
        return PartitionSpec(*entries)

    def opened_cuts(self, cuts: Cuts) -> Cuts:
        """Of its last two axes."""
        return cuts[-2:]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one array lies, and how what a device has of it becomes a stack.

    Attributes:
      entries: The mesh axes that cut each of its axes, the major one first.
      batch_axes: The axes that count matrices.
      opens: The leaf's reading if each device opens its own piece: then leaves of several shapes
        are stacks of one.
    """

    entries: Cuts
    batch_axes: tuple[int, ...]
    opens: Reading | None = None

    @property
    def spec(self) -> PartitionSpec:
        """As `jax.shard_map` takes it."""
        return PartitionSpec(*(entry or None for entry in self.entries))

    @property
    def cuts(self) -> Cuts:
        """Of the axes of one matrix in the stack."""
        opened = None if self.opens is None else self.opens.opened_cuts(self.entries)
        return opened or tuple(e for a, e in enumerate(self.entries) if a not in self.batch_axes)

    @property
    def batch_cuts(self) -> tuple[str, ...]:
        """Mesh axes whose devices have different matrices already."""
        return tuple(name for a in self.batch_axes for name in self.entries[a])

    def stacked(self, x: jax.Array) -> jax.Array:
        """What one device has of the array: one batch axis in front."""
        front = range(len(self.batch_axes))
        x = jnp.moveaxis(x, self.batch_axes, front)
        x = x.reshape(-1, *x.shape[len(front) :])
        return x if self.opens is None else self.opens.of_stack(x.shape[1:]).opened(x)

    def unstacked(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Undoes `stacked`, for an array of this shape on one device."""
        batch, rest = self.apart(shape)
        y = y if self.opens is None else self.opens.of_stack(rest).closed(y)
        return jnp.moveaxis(y.reshape(*batch, *rest), range(len(batch)), self.batch_axes)

    def apart(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the batch axes, and of the others."""
        batch = tuple(shape[a] for a in self.batch_axes)
        return batch, tuple(n for a, n in enumerate(shape) if a not in self.batch_axes)
