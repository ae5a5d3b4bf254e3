"""Penalties, constraints and Householder products: time beside what else would do, and exactness.

    python benchmarks/penalties.py            # ten minutes on two cores
    python benchmarks/penalties.py --smoke    # tiny sizes, in seconds, writes nothing

Times are medians of jitted calls that take turns in one process. The unit of the first table is the
orthogonalisation of optax.contrib.muon, five quintic steps, on the same matrix. The last table
follows a matrix of 768 x 768 that `keep_orthogonal` holds over 10,000 updates.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from jax import lax

import orthax
from orthax import penalties
from orthax.conv_penalties import convolution_orthogonality
from orthax.diagnostics import orthogonality_error
from orthax.linalg import householder_product, nearest_orthogonal, polar_svd

SHAPES = ((256, 256), (768, 768), (768, 3072), (3072, 768))
KERNELS = ((3, 3, 16, 32), (3, 3, 64, 64), (5, 5, 32, 64), (3, 3, 256, 256))
REFLECTORS = ((64, 64), (256, 256), (512, 512), (768, 64))

Function = Callable[..., Any]


def random_matrix(shape: tuple[int, ...]) -> jax.Array:
    """Normal entries, columns of length about 1."""
    generator = np.random.default_rng(0)
    size = np.prod(shape[:-1])
    return jnp.asarray(generator.standard_normal(shape) / np.sqrt(size), jnp.float32)


def naive_soft_orthogonality(w: jax.Array) -> jax.Array:
    """The formula as it is written down, left to autodiff."""
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    return jnp.sum(jnp.square(gram - jnp.eye(gram.shape[0])))


def time_calls(functions: dict[str, Function], argument: jax.Array, rounds: int) -> dict[str, Any]:
    """Seconds of each function of the argument, in turn."""
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    calls = {name: functools.partial(function, argument) for name, function in compiled.items()}
    return record.interleaved(calls, rounds)


def penalty_row(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Value and gradient of each penalty, and each constraint, in quintics of optax."""
    w = random_matrix(shape)
    orthogonal = nearest_orthogonal(w)
    init, apply = penalties.warm_spectral_restricted_isometry()
    vector = init(w)
    scalars = {
        "naive soft": naive_soft_orthogonality,
        "soft": penalties.soft_orthogonality,
        "double soft": penalties.double_soft_orthogonality,
        "coherence": penalties.mutual_coherence,
        "λ": functools.partial(penalties.lambda_orthogonality, radius=4.0),
        "SRIP": penalties.spectral_restricted_isometry,
    }
    functions: dict[str, Function] = {"quintic": record.optax_quintic}
    functions |= {name: jax.value_and_grad(function) for name, function in scalars.items()}
    functions["SRIP, warm"] = lambda w: jax.value_and_grad(apply, has_aux=True)(w, vector)

    def step(transformation: optax.GradientTransformation) -> Function:
        return lambda g: transformation.update(0.01 * g, transformation.init(g), orthogonal)[0]

    functions["keep_orthogonal"] = step(orthax.keep_orthogonal())
    functions["the same by SVD"] = step(orthax.keep_orthogonal(polar_svd))
    functions["project_tangent"] = step(orthax.project_tangent())
    speeds = record.speeds(time_calls(functions, w, rounds), "quintic")
    return {"shape": shape, **{name: round(1 / speed[0], 3) for name, speed in speeds.items()}}


def self_convolution(kernel: jax.Array) -> jax.Array:
    """L_orth as a convolution of the kernel with itself, stride 1."""
    pads = [(k - 1, k - 1) for k in kernel.shape[:2]]
    numbers = ("HWCN", "HWIO", "HWNC")
    product = lax.conv_general_dilated(kernel, kernel, (1, 1), pads, dimension_numbers=numbers)
    product = product.at[pads[0][0], pads[1][0]].add(-jnp.eye(kernel.shape[-1]))
    return jnp.sum(jnp.square(product)) - max(0, kernel.shape[-1] - kernel.shape[-2])


def convolution_row(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds of L_orth and of its gradient, by products and by the self-convolution."""
    kernel = random_matrix(shape)
    ours, theirs = convolution_orthogonality, self_convolution
    functions = {
        "products": ours,
        "products, gradient": jax.value_and_grad(ours),
        "convolution": theirs,
        "convolution, gradient": jax.value_and_grad(theirs),
    }
    times = time_calls(functions, kernel, rounds)
    difference = abs(float(ours(kernel) / theirs(kernel)) - 1)
    row = {"kernel": shape, **{name: record.milliseconds(t) for name, t in times.items()}}
    return row | {"difference": f"{difference:.0e}"}


def householder_row(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Products of reflections in WY form and by LAPACK, and the exponential of a skew matrix."""
    v = random_matrix(shape)
    n, r = shape

    def lapack(v: jax.Array) -> jax.Array:
        """Needs a unit diagonal and zeros above it; that is given here."""
        taus = 2 / jnp.sum(jnp.square(v), axis=0)
        return lax.linalg.householder_product(v, taus)

    def exponential(v: jax.Array) -> jax.Array:
        square = jnp.zeros((n, n)).at[:, :r].set(v)
        return jax.scipy.linalg.expm(square - square.T)[:, :r]

    lower = jnp.tril(v, -1) + jnp.eye(n, r)
    target = random_matrix(shape)

    def gradient(function: Function) -> Function:
        return jax.grad(lambda v: jnp.sum(function(v) * target))

    ours = functools.partial(householder_product, columns=r)
    functions = {
        "WY": ours,
        "LAPACK": lapack,
        "expm": exponential,
        "WY, gradient": gradient(ours),
        "expm, gradient": gradient(exponential),
    }
    times = time_calls(functions, lower, rounds)
    row = {"n, r": shape, **{name: record.milliseconds(t) for name, t in times.items()}}
    for name in ("WY", "LAPACK", "expm"):
        row[f"{name}, error"] = f"{largest_deviation(functions[name](lower)):.1e}"
    return row | {"WY - LAPACK": f"{float(jnp.max(jnp.abs(ours(lower) - lapack(lower)))):.1e}"}


def largest_deviation(q: Any) -> float:
    """Largest entry of q^T q - I, in float64."""
    q = np.asarray(q, np.float64)
    return float(np.abs(q.T @ q - np.eye(q.shape[1])).max())


def long_run(size: int, updates: int, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """Random gradients on a matrix that `keep_orthogonal` holds: how far it ever gets."""
    w = nearest_orthogonal(random_matrix((size, size)))
    chain = optax.chain(optimizer, orthax.keep_orthogonal())
    every = max(1, updates // 20)

    @jax.jit
    def steps(w: jax.Array, state: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            w, state, largest = carry
            u, state = chain.update(jax.random.normal(key, w.shape), state, w)
            w = w + u
            return (w, state, jnp.maximum(largest, orthogonality_error(w))), optax.tree.norm(u)

        keys = jax.random.split(key, every)
        (w, state, largest), sizes = lax.scan(step, (w, state, jnp.zeros([])), keys)
        return w, state, largest, jnp.mean(sizes)

    state, largest, spectral, size_of_update = chain.init(w), 0.0, [], 0.0
    for i in range(updates // every):
        w, state, frobenius, moved = steps(w, state, jax.random.key(i))
        largest, size_of_update = max(largest, float(frobenius)), float(moved)
        exact = np.asarray(w, np.float64)
        spectral.append(float(np.linalg.norm(exact.T @ exact - np.eye(size), 2)))
    return {
        "size": size,
        "updates": updates // every * every,
        "Frobenius norm of an update": round(size_of_update, 3),
        "spectral norm of W^T W - I at twenty points, at most": f"{max(spectral):.1e}",
        "Frobenius norm at every update, at most": f"{largest:.1e}",
    }


def main() -> None:
    """Measure, print, and write unless it is a smoke test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    smoke = parser.parse_args().smoke
    rounds = 2 if smoke else 25
    size = 16 if smoke else 768
    runs = {
        "adam(1e-3)": (optax.adam(1e-3), 40 if smoke else 10_000),
        "sgd(0.01, 0.9)": (optax.sgd(0.01, momentum=0.9), 40 if smoke else 2_000),
    }
    data = {
        "penalties": [penalty_row(s, rounds) for s in (((16, 8),) if smoke else SHAPES)],
        "convolutions": [convolution_row(s, rounds) for s in (KERNELS[:1] if smoke else KERNELS)],
        "householder": [householder_row(s, rounds) for s in (((9, 4),) if smoke else REFLECTORS)],
        "long_run": [
            {"optimizer": name} | long_run(size, updates, optimizer)
            for name, (optimizer, updates) in runs.items()
        ],
    }
    titles = {
        "penalties": "Value and gradient, or update, in optax's quintics",
        "convolutions": "L_orth, milliseconds",
        "householder": "First r columns of r reflections, milliseconds; largest entry of Q^T Q - I",
        "long_run": "keep_orthogonal after an optimizer, random gradients",
    }
    for name, title in titles.items():
        print(f"\n{title}\n{record.table(data[name])}")
    if not smoke:
        print(f"\nData: {record.write('penalties', data)}")


if __name__ == "__main__":
    main()
