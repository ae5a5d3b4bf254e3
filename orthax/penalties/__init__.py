r"""Penalties on the distance of a matrix from orthogonality: from arrays to scalars.

All but `lambda_orthogonality` pull towards :math:`W^T W = I`, of the shorter side. Each is used in
two ways: in a loss, `loss + strength * penalty(w)`, or in a chain, with `orthax.add_penalty`.
Penalties of convolution kernels are in `orthax.conv_penalties`.
"""

from orthax.base.with_memory import WithMemory
from orthax.penalties.gram import (
    double_soft_orthogonality,
    lambda_orthogonality,
    mutual_coherence,
    soft_orthogonality,
)
from orthax.penalties.isometry import (
    spectral_restricted_isometry,
    warm_spectral_restricted_isometry,
)

# fmt: off
__all__ = [
    "WithMemory", "double_soft_orthogonality", "lambda_orthogonality", "mutual_coherence",
    "soft_orthogonality", "spectral_restricted_isometry", "warm_spectral_restricted_isometry",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__
