"""The table of public functions of an array of matrices, for tests that all of them pass."""

import functools

import jax.numpy as jnp

from orthax import conv_penalties, diagnostics, linalg, penalties


def with_memory(memory):
    return lambda w: memory.apply(w, memory.init(w))


FUNCTIONS = {
    "frobenius_norm": linalg.frobenius_norm,
    "normalize": linalg.normalize,
    "top_columns": lambda x: linalg.top_columns(x, 2),
    "newton_schulz": linalg.newton_schulz,
    "gram_newton_schulz": linalg.gram_newton_schulz,
    "zolotarev": functools.partial(linalg.zolotarev, degree=3, passes=2),
    "zolotarev of one": lambda x: linalg.zolotarev(jnp.asarray(x)[0]),
    "polar": linalg.polar,
    "polar_svd": linalg.polar_svd,
    "nearest_orthogonal": linalg.nearest_orthogonal,
    "spectral_norm": functools.partial(linalg.spectral_norm, steps=3),
    "spectral_norm from a vector": lambda x: linalg.spectral_norm(
        x, jnp.ones((2, 4), jnp.float32), 3
    ),
    "dct by fft": functools.partial(linalg.dct, method="fft"),
    "idct by fft": functools.partial(linalg.idct, method="fft"),
    "dct": linalg.dct,
    "idct": linalg.idct,
    "householder_product": linalg.householder_product,
    "householder_vectors": linalg.householder_vectors,
    "householder_projector": lambda x: linalg.householder_projector(x, x),
    "householder_factors": linalg.householder_factors,
    "convolution_matrix": lambda x: linalg.convolution_matrix(x, 3),
    "convolution_singular_values": lambda x: linalg.convolution_singular_values(x, 3),
    "soft_orthogonality": penalties.soft_orthogonality,
    "double_soft_orthogonality": penalties.double_soft_orthogonality,
    "mutual_coherence": penalties.mutual_coherence,
    "lambda_orthogonality": functools.partial(penalties.lambda_orthogonality, radius=1.0),
    "spectral_restricted_isometry": penalties.spectral_restricted_isometry,
    "warm_spectral_restricted_isometry": with_memory(
        penalties.warm_spectral_restricted_isometry(steps=3)
    ),
    "convolution_orthogonality": conv_penalties.convolution_orthogonality,
    "orthogonality_error": diagnostics.orthogonality_error,
    "orthogonality_error spectral": functools.partial(
        diagnostics.orthogonality_error, norm="spectral"
    ),
    "singular_values": diagnostics.singular_values,
    "stable_rank": diagnostics.stable_rank,
    "effective_rank": diagnostics.effective_rank,
    "neuron_norm_spread": diagnostics.neuron_norm_spread,
    "update_to_weight_ratio": lambda x: diagnostics.update_to_weight_ratio(x, 2 * jnp.asarray(x)),
    "warm_spectral_norm": with_memory(diagnostics.warm_spectral_norm(steps=3)),
}
OTHERS = {  # no function of an array
    "SpectralNorm", "coefficients", "dct_matrix", "WithMemory", "orthogonal_convolution_exists",
    "of_both", "of_params", "of_updates", "scalars",
}  # fmt: skip
