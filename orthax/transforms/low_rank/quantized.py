"""What `low_rank` keeps in 8 or 4 bits an entry: gradients outside their subspace, moments."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from orthax.base.leaves import explicit_sharding, spec_of
from orthax.base.placing import laid_out
from orthax.linalg.elementary import divided, root, wide
from orthax.linalg.quantization import Quantized, dequantize, quantize, quantized_zeros
from orthax.transforms.low_rank.frames import Frame

ROUNDINGS = ("nearest", "stochastic")


def quantized(x: jax.Array, bits: int, key: jax.Array | None = None) -> Quantized:
    """`quantize` of an array that may lie on Explicit mesh axes: rows have their numbers whole."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return quantize(x, bits, key)
    row: Any = sharding.update(spec=PartitionSpec(*spec_of(sharding, x.ndim)[:-1], None))
    codes: Any = sharding if bits == 8 else row
    return laid_out(lambda x, key: quantize(x, bits, key), Quantized(codes, row, row))(x, key)


def dequantized(kept: Quantized, bits: int, columns: int, sharding: Any) -> jax.Array:
    """Undoes `quantized`, with the sharding that the array had on Explicit axes, or None."""
    return laid_out(lambda kept: dequantize(kept, bits, columns), sharding)(kept)


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
        quantized(x, bits, _key(seed, frame.path, count))
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
        dequantized(Quantized(*parts), bits, frame.shape[-1], frame.sharding)
        for frame, *parts in zip(frames, *fields, strict=True)
    ]


def with_quantized_mu(state: Any, bits: int, *, start: bool = False) -> Any:
    """Adam's state with its first moment in 8 bits an entry; at the start of zeros, unread.

    In units of the root of the second moment, as Adam uses it: levels between the ends of a row of
    moments would be wider than its small ones, and Adam would divide by nearly nothing.
    """

    def saved(mu: jax.Array, nu: jax.Array) -> Quantized:
        return quantized(divided(wide(mu), root(wide(nu))), bits)

    moments, structure = jax.tree.flatten(state.mu)
    if start:
        parts = [quantized_zeros(mu, bits) for mu in moments]
    else:
        parts = [*map(saved, moments, jax.tree.leaves(state.nu))]
    return state._replace(mu=in_one(parts, structure))


def with_whole_mu(state: Any, bits: int) -> Any:
    """The same state with the moment in floating point."""

    def whole(nu: jax.Array, *parts: jax.Array) -> jax.Array:
        kept = Quantized(*parts)
        columns, sharding = kept.codes.shape[-1], explicit_sharding(kept.codes)
        return dequantized(kept, bits, columns, sharding) * root(wide(nu))

    return state._replace(mu=jax.tree.map(whole, state.nu, *state.mu))


def _key(seed: int | None, path: str, count: jax.Array) -> jax.Array | None:
    """A key of the leaf's own, whatever other leaves there are."""
    if seed is None:
        return None
    of_leaf = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return jax.random.fold_in(of_leaf, count)
