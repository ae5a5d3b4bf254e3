"""The orthonormal cosine transforms of types II and III, as a matrix product and by FFT."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from orthax.base import check
from orthax.base.leaves import check_matrices
from orthax.base.platform import by_platform
from orthax.linalg.elementary import wide

Method = Literal["auto", "matrix", "fft"]

FFT_FROM = {"cpu": 256}
"""Length from which the FFT is faster than the product, by platform (benchmarks/low_rank.py), about
the same in all dtypes. Elsewhere "auto" multiplies. On meshes it does the same, though there an FFT
is gathered and a product is not: one function everywhere is worth more."""

LONGEST = 2**15
"""For a matrix: integers up to 2 n**2 stay below 2**32."""


def dct(x: jax.Array, *, method: Method = "auto") -> jax.Array:
    r"""Orthonormal DCT-II of each row.

    :math:`y_k = s_k \sum_j x_j \cos(\pi k (2j + 1) / 2n)` with :math:`s_0 = \sqrt{1/n}` and
    :math:`s_k = \sqrt{2/n}`, the product with `dct_matrix(n)`. Smooth rows need few coefficients.
    Reference: Makhoul, A fast cosine transform in one and two dimensions, IEEE TASSP 28, 1980.

    Args:
      x: Shape (..., m, n), real or complex floating; the last axis is transformed.
      method: "matrix" multiplies by `dct_matrix(n)`, which shards without collectives over all axes
        but the last; "fft" takes n log n operations a row, and is gathered on meshes; "auto" the
        faster on the platform that the program is compiled for, "fft" for more than 32768 columns.

    Returns:
      Same shape and dtype; 16-bit input is computed in float32.

    Raises:
      ValueError: For fewer than two axes or an unknown `method`; TypeError: if `x` is not floating.

    Example:
      >>> print(dct(jnp.ones((1, 4))).round(3))
      [[2. 0. 0. 0.]]
    """
    return _transformed("dct", x, method)


def idct(x: jax.Array, *, method: Method = "auto") -> jax.Array:
    """Inverse of `dct`, the orthonormal DCT-III of each row.

    Args:
      x: Shape (..., m, n), real or complex floating; the last axis is transformed.
      method: As in `dct`.

    Returns:
      Same shape and dtype; 16-bit input is computed in float32.

    Raises:
      ValueError: For fewer than two axes or an unknown `method`; TypeError: if `x` is not floating.

    Example:
      >>> x = jnp.array([[3.0, -1.0, 2.0]])
      >>> bool(jnp.allclose(idct(dct(x)), x, atol=1e-6))
      True
    """
    return _transformed("idct", x, method)


def dct_matrix(n: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The matrix of the orthonormal DCT-II, by which `dct` multiplies.

    Its transpose is that of `idct`. Column k is a cosine of k half periods, exact to rounding.

    Args:
      n: Length of a row, at most 32768.
      dtype: Real floating.

    Returns:
      Shape (n, n).

    Raises:
      ValueError: If `n` is outside [1, 32768], or `dtype` is not floating.
      TypeError: If `n` is no integer, or `dtype` no dtype.

    Example:
      >>> print(dct_matrix(2).round(3))
      [[ 0.707  0.707]
       [ 0.707 -0.707]]
    """
    n = check.integer("dct_matrix: n", n, f"[1, {LONGEST}]")
    check.floating_dtype("dct_matrix: dtype", dtype, kind=jnp.floating, none=False)
    return dct_columns(n, jnp.arange(n), dtype)


def dct_columns(
    n: int, indices: jax.Array, dtype: DTypeLike, *, transposed: bool = False
) -> jax.Array:
    """Columns of the DCT-II matrix, or its transpose, (..., n, r) for indices (..., r)."""
    place = jnp.reshape(jnp.arange(n, dtype=jnp.uint32), (*(1,) * (indices.ndim - 1), n, 1))
    frequency = indices.astype(jnp.uint32)[..., None, :]
    if transposed:
        place, frequency = frequency, place
    # Looked up, as 4n cosines in float64 are cheaper and more exact than n * r in `dtype`: entry
    # (j, k) is cos(pi k (2 j + 1) / 2n), and k (2 j + 1) counts modulo a full turn, 4n.
    angles = np.arange(4 * n) * (np.pi / (2 * n))
    cosines = jnp.asarray(np.sqrt(2 / n) * np.cos(angles), dtype)
    found = cosines[(frequency * (2 * place + 1)) % np.uint32(4 * n)]
    return jnp.where(frequency == 0, jnp.asarray(np.sqrt(1 / n), dtype), found)


def check_length(call: str, n: int) -> None:
    """Raises unless there is a matrix of the transform for rows of length n."""
    if n > LONGEST:
        raise ValueError(f"{call}: the cosine matrix has at most {LONGEST} rows, got {n}.")


def _transformed(call: str, x: jax.Array, method: Method) -> jax.Array:
    x = check_matrices(call, x)
    check.choice(f"{call}: method", method, ("auto", "matrix", "fft"))
    if x.size == 0:
        return x
    if method == "matrix":
        check_length(call, x.shape[-1])
    return cosine_transform(wide(x), method, inverse=call == "idct").astype(x.dtype)


def cosine_transform(x: jax.Array, method: Method = "auto", *, inverse: bool = False) -> jax.Array:
    """`dct`, or `idct`, of checked arguments in at least float32."""
    if method == "fft" or x.shape[-1] > LONGEST:  # there is no such matrix
        return _by_fft(x, inverse)
    if method == "matrix" or x.shape[-1] < min(FFT_FROM.values()):
        return _by_matrix(x, inverse)
    return _by_the_faster(x, inverse)


# Traced once per shape, and without a jit around it the device where x lies decides.
@functools.partial(jax.jit, static_argnames="inverse")
def _by_the_faster(x: jax.Array, inverse: bool) -> jax.Array:
    by_fft = functools.partial(_by_fft, inverse=inverse)
    platforms = [name for name, least in FFT_FROM.items() if x.shape[-1] >= least]
    default = functools.partial(_by_matrix, inverse=inverse)
    return by_platform(dict.fromkeys(platforms, by_fft), default)(x)


def _by_matrix(x: jax.Array, inverse: bool) -> jax.Array:
    n = x.shape[-1]
    matrix = dct_columns(n, jnp.arange(n), x.real.dtype, transposed=inverse)
    return jnp.matmul(x, matrix.astype(x.dtype), precision="highest")


def _by_fft(x: jax.Array, inverse: bool) -> jax.Array:
    by_fft = _idct_by_fft if inverse else _dct_by_fft
    if jnp.iscomplexobj(x):
        return jax.lax.complex(by_fft(x.real), by_fft(x.imag))
    return by_fft(x)


def _dct_by_fft(x: jax.Array) -> jax.Array:
    # Makhoul's order of the row, v = (x_0, x_2, x_4, ..., x_5, x_3, x_1), makes the cosine sum a
    # Fourier sum of length n: y_k = s_k Re(exp(-i pi k / 2n) V_k). As v is real, the real part for
    # n - k is minus the imaginary part for k: half of the spectrum V gives all y.
    n = x.shape[-1]
    spectrum = jnp.fft.rfft(jnp.concatenate([x[..., ::2], x[..., 1::2][..., ::-1]], axis=-1))
    turned = spectrum * _turns(x).conj()
    return jnp.concatenate([turned.real, -turned.imag[..., 1 : (n + 1) // 2][..., ::-1]], axis=-1)


def _idct_by_fft(y: jax.Array) -> jax.Array:
    # The same backwards: V_k = exp(i pi k / 2n) (y_k - i y_(n-k)) / s_k, y_n = 0; v's ends are x.
    n = y.shape[-1]
    half = n // 2 + 1
    mirrored = jnp.concatenate([jnp.zeros_like(y[..., :1]), y[..., : n - half : -1]], axis=-1)
    spectrum = jax.lax.complex(y[..., :half], -mirrored) / _turns(y).conj()
    x = jnp.fft.irfft(spectrum, n)
    even, odd = x[..., : (n + 1) // 2], x[..., n // 2 :][..., ::-1]  # of an odd n, one too many
    return jnp.reshape(jnp.stack([even, odd], axis=-1), (*x.shape[:-1], -1))[..., :n]


def _turns(x: jax.Array) -> jax.Array:
    """Scaled turns s_k exp(i pi k / 2n) for the first half of a spectrum, (1, ..., n // 2 + 1)."""
    n = x.shape[-1]
    k = np.arange(n // 2 + 1)
    scale = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
    turns = scale * np.exp(0.5j * np.pi * k / n)
    turns = np.reshape(turns, (*(1,) * (x.ndim - 1), -1))
    return jnp.asarray(turns, np.result_type(x.dtype, np.complex64))
