"""Hermitian products from half of their blocks: what is above the diagonal is known from below.

x y^H is known to be Hermitian where y is x (a Gram matrix), or where both are polynomials of one
Hermitian matrix. XLA has no product that makes use of it; here are two, for `elementary.HALVED`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orthax.base.leaves import vary_as


def by_blocks(
    x: jax.Array, y: jax.Array, precision: lax.PrecisionLike = None, *, levels: int = 1
) -> jax.Array:
    """The Hermitian x y^H, shape (..., m, n) to (..., m, m), without its upper right quarter.

    Both squares on the diagonal are cut again as often as `levels` says: one level takes 3/4 of the
    products, two take 5/8.
    """
    half = x.shape[-2] // 2
    if levels == 0 or half == 0:
        return jnp.matmul(x, y.mT.conj(), precision=precision)
    again = functools.partial(by_blocks, precision=precision, levels=levels - 1)
    x_top, x_low, y_top, y_low = (z[..., rows, :] for z in (x, y) for rows in _halves(half))
    corner = jnp.matmul(x_low, y_top.mT.conj(), precision=precision)
    return jnp.block([[again(x_top, y_top), corner.mT.conj()], [corner, again(x_low, y_low)]])


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)


# --- a kernel


class Tiles(NamedTuple):
    """Sizes of the kernel's tiles: of the product, and of the axis that is summed over."""

    side: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3


def by_kernel(
    x: jax.Array,
    y: jax.Array,
    precision: lax.PrecisionLike = None,
    *,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """The Hermitian x y^H by a Pallas kernel for GPUs: tiles below the diagonal, mirrored.

    Real, of 16 or 32 bits; others are multiplied in full. Sums are in float32. `interpret` runs the
    kernel on any backend, slowly, to test it.
    """
    if jnp.iscomplexobj(x) or jnp.finfo(x.dtype).bits > 32 or 0 in x.shape:
        return jnp.matmul(x, y.mT.conj(), precision=precision)
    return _product(x, y, precision, tiles, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _product(
    x: jax.Array, y: jax.Array, precision: lax.PrecisionLike, tiles: Tiles, interpret: bool
) -> jax.Array:
    from jax.experimental import pallas  # not at the top: it takes a second to import

    *batch, m, n = x.shape
    rows, columns = (-(-size // tile) * tile for size, tile in ((m, tiles.side), (n, tiles.depth)))
    padding = ((0, 0), (0, rows - m), (0, columns - n))
    flat = [jnp.pad(z.reshape(-1, m, n), padding) for z in (x, y)]
    lower = np.tril_indices(rows // tiles.side)
    body = functools.partial(_tile, precision=precision, tiles=tiles)
    shape = (len(flat[0]), rows, rows)
    result = pallas.pallas_call(
        body,
        out_shape=jax.eval_shape(lambda: vary_as(jnp.zeros(shape, x.dtype), flat)),
        grid=(len(lower[0]), len(flat[0])),
        interpret=interpret,
        name="hermitian_product",
        **({} if interpret else _on_gpu(tiles)),
    )(*(jnp.asarray(index, jnp.int32) for index in lower), *flat)
    return result[:, :m, :m].reshape(*batch, m, m)


@_product.defjvp
def _(
    precision: lax.PrecisionLike, tiles: Tiles, interpret: bool, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    product = functools.partial(jnp.matmul, precision=precision)
    return _product(x, y, precision, tiles, interpret), product(dx, y.mT) + product(x, dy.mT)


def _on_gpu(tiles: Tiles) -> dict[str, Any]:
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return {"compiler_params": params}


def _tile(
    tile_rows: Any,
    tile_columns: Any,
    x: Any,
    y: Any,
    out: Any,
    *,
    precision: lax.PrecisionLike,
    tiles: Tiles,
) -> None:
    """One tile of the product on or below the diagonal, and its mirror image."""
    from jax.experimental import pallas

    pair, matrix = pallas.program_id(0), pallas.program_id(1)
    below, above = (
        pallas.ds(index[pair] * tiles.side, tiles.side) for index in (tile_rows, tile_columns)
    )

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        depth = pallas.ds(k * tiles.depth, tiles.depth)
        return total + jnp.dot(
            x[matrix, below, depth],
            y[matrix, above, depth].T,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    zeros = jnp.zeros((tiles.side, tiles.side), jnp.float32)
    total = lax.fori_loop(0, x.shape[-1] // tiles.depth, add, zeros).astype(out.dtype)
    out[matrix, below, above] = total
    out[matrix, above, below] = total.T  # on the diagonal the same, but for rounding
