"""What `low_rank` keeps of gradients outside their subspace, in 8 or 4 bits an entry."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax

from orthax.linalg.quantization import Quantized
from orthax.transforms.low_rank.frames import Frame

ROUNDINGS = ("nearest", "stochastic")


def quantize_leaves(
    frames: Sequence[Frame],
    xs: Sequence[jax.Array],
    structure: Any,
    *,
    bits: int,
    seed: int | None,
    count: jax.Array,
) -> Quantized:
    """What a state holds of the arrays `xs`: a `Quantized` of trees of the given structure.

    Stochastic rounding draws anew from the seed for each `count`; None rounds to the nearest.
    """
    parts = [
        frame.quantize(x, bits, _key(seed, frame.path, count))
        for frame, x in zip(frames, xs, strict=True)
    ]
    return in_one(parts, structure)


def in_one(parts: Sequence[Quantized], structure: Any) -> Quantized:
    """A `Quantized` of trees of the given structure, from one for each leaf."""
    # A tuple of trees, not a tree of tuples: so `optax.tree.map_params` finds them.
    fields = range(len(Quantized._fields))
    return Quantized(*(structure.unflatten([part[i] for part in parts]) for i in fields))


def dequantize_leaves(
    frames: Sequence[Frame], saved: Quantized, structure: Any, bits: int
) -> list[jax.Array]:
    """The arrays that were saved."""
    fields = [structure.flatten_up_to(field) for field in saved]
    return [
        frame.dequantize(Quantized(*parts), bits)
        for frame, *parts in zip(frames, *fields, strict=True)
    ]


def _key(seed: int | None, path: str, count: jax.Array) -> jax.Array | None:
    """A key of the leaf's own, whatever other leaves there are."""
    if seed is None:
        return None
    of_leaf = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return jax.random.fold_in(of_leaf, count)
