"""Hadamard matrices: orthogonal up to a factor, with entries of +1 and -1 only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def check_hadamard_size(call: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the matrix of size n, or a `ValueError` if there is none."""
    factors = _factors(n)
    if factors is None:
        raise ValueError(
            f"{call}: no Hadamard matrix of size {n} is known here; there are those of 2**k and of "
            "(q + 1) 2**k for a prime q = 3 mod 4, such as 12, 20, 24, 40, 44, 48, ..., 768, 1280."
        )
    return factors


def hadamard_transform(x: jax.Array) -> jax.Array:
    """The product of `x`, shape (..., m, n), with the orthogonal Hadamard matrix of size n."""
    # The matrix is a Kronecker product, so a row is read as a small matrix and multiplied from both
    # sides: n (a + b) operations where the full product takes n^2.
    factors = check_hadamard_size("hadamard", x.shape[-1])
    a, b = (factor.astype(x.real.dtype) for factor in factors)
    parts = jnp.reshape(x, (*x.shape[:-1], len(a), len(b)))
    product = jnp.einsum("...ab,ac,bd->...cd", parts, a, b, precision="highest")
    return jnp.reshape(product, x.shape)


def hadamard_columns(n: int, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Columns, (..., n, r) for indices (..., r), of the orthogonal Hadamard matrix of size n."""
    # Column i of the Kronecker product is that of column i // b of one and i % b of the other.
    a, b = (jnp.asarray(factor.T, dtype) for factor in check_hadamard_size("hadamard", n))
    of_a, of_b = a[indices // len(b)], b[indices % len(b)]
    columns = of_a[..., :, None] * of_b[..., None, :]
    return jnp.reshape(columns, (*indices.shape, n)).mT


@functools.cache
def _factors(n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Two orthogonal matrices of about equal size whose Kronecker product is that of size n."""
    # n = size 2^k: Paley's construction gives a matrix of the first size, for the smallest that has
    # one, and Sylvester's doubling the rest. Doublings are shared out between both factors.
    twos = (n & -n).bit_length() - 1
    for k in range(twos, -1, -1):
        base = _paley(n >> k)
        if base is not None:
            a = np.kron(base, _sylvester(k // 4 if len(base) > 2 else k // 2))
            b = _sylvester((n // len(a)).bit_length() - 1)
            return a / np.sqrt(len(a)), b / np.sqrt(len(b))
    return None


def _sylvester(k: int) -> np.ndarray:
    """The Hadamard matrix of size 2**k."""
    return functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * k, np.ones((1, 1), int))


def _paley(size: int) -> np.ndarray | None:
    """A Hadamard matrix of size 1, or of a prime = 3 mod 4 plus one; None for all other sizes."""
    q = size - 1
    if size == 1:
        return np.ones((1, 1), int)
    if q % 4 != 3 or any(q % factor == 0 for factor in range(3, int(q**0.5) + 1)):
        return None
    # Paley's first construction: I + S with S skew, [[0, 1], [-1, Q]] and Q_ij the quadratic
    # character of i - j modulo q. S S^T = q I, because q = 3 mod 4 makes Q skew.
    squares = {x * x % q for x in range(1, q)}
    character = np.array([0, *(1 if x in squares else -1 for x in range(1, q))])
    skew = np.zeros((size, size), int)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return np.eye(size, dtype=int) + skew
