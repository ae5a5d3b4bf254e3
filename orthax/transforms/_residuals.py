"""What `low_rank` keeps of gradients outside their subspace: arrays, or 8 or 4 bits an entry."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from orthax.linalg._quantization import Quantized
from orthax.transforms._frames import Frame

BITS = {"int8": 8, "int4": 4}
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True)
class Residuals:
    """How residuals are kept in a state.

    Attributes:
      dtype: None (the gradient's), a dtype, or a name in BITS.
      rounding: Of the bits: "nearest", or "stochastic" for the right expectation.
      seed: Of stochastic rounding.
    """

    dtype: Any
    rounding: Literal["nearest", "stochastic"]
    seed: int

    def __post_init__(self) -> None:
        """Raises unless the settings are possible."""
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"low_rank: rounding must be one of {ROUNDINGS}, got {self.rounding!r}."
            )
        if self.dtype is None or self._bits:
            return
        message = (
            'low_rank: buffer_dtype must be None, a floating dtype, "int8" or "int4", got '
            f"{self.dtype!r}."
        )
        try:
            floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.inexact)
        except TypeError as error:
            raise TypeError(message) from error
        if not floating:
            raise ValueError(message)

    @property
    def _bits(self) -> int | None:
        return BITS.get(self.dtype) if isinstance(self.dtype, str) else None

    def save(
        self,
        frames: Sequence[Frame],
        xs: Sequence[jax.Array],
        like: Sequence[jax.Array],
        structure: Any,
        count: jax.Array,
    ) -> Any:
        """What a state holds of the arrays `xs`: a tree of arrays, or `Quantized` trees.

        Args:
          frames: Of the leaves.
          xs: The residuals.
          like: The gradients.
          structure: Of the tree of leaves.
          count: Of the update, for stochastic rounding.
        """
        for frame, x in zip(frames, xs, strict=True):
            if jnp.iscomplexobj(x) and not (
                self.dtype is None or jnp.issubdtype(self.dtype, jnp.complexfloating)
            ):
                raise TypeError(
                    f"low_rank: '{frame.path}' is complex, and buffer_dtype={self.dtype!r} is not."
                )
        if self._bits is None:
            kept = [x.astype(self.dtype or g.dtype) for x, g in zip(xs, like, strict=True)]
            return structure.unflatten(kept)
        parts = [
            frame.quantize(x, self._bits, self._key(frame.path, count))
            for frame, x in zip(frames, xs, strict=True)
        ]
        fields = range(len(Quantized._fields))
        return Quantized(*(structure.unflatten([part[i] for part in parts]) for i in fields))

    def _key(self, path: str, count: jax.Array) -> jax.Array | None:
        """A key of the leaf's own, whatever other leaves there are."""
        if self.rounding == "nearest":
            return None
        of_leaf = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
        return jax.random.fold_in(of_leaf, count)

    def load(self, frames: Sequence[Frame], saved: Any, structure: Any) -> list[jax.Array]:
        """The arrays that were saved."""
        if self._bits is None:
            return structure.flatten_up_to(saved)
        fields = [structure.flatten_up_to(field) for field in saved]
        return [
            frame.dequantize(Quantized(*parts), self._bits)
            for frame, *parts in zip(frames, *fields, strict=True)
        ]
