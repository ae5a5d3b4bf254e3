r"""Numbers to watch in training: how orthogonal, how flat, how large.

The first functions take matrices and return a number for each. `of_updates`, `of_params` and
`of_both` turn any of them into what `optax.snapshot` and `optax.monitor` take:

    optax.chain(
        orthax.muon(1e-3),
        optax.monitor({
            "rank": of_updates(stable_rank),
            "error": of_params(orthogonality_error),
            "ratio": of_both(update_to_weight_ratio),
        }),
    )
    optax.tree.get(state, "ratio")  # {"blocks/0/up/kernel": ..., ...}
"""

from orthax.diagnostics.flat import scalars
from orthax.diagnostics.measures import (
    effective_rank,
    neuron_norm_spread,
    orthogonality_error,
    singular_values,
    stable_rank,
    update_to_weight_ratio,
    warm_spectral_norm,
)
from orthax.diagnostics.monitoring import of_both, of_params, of_updates

# fmt: off
__all__ = [
    "effective_rank", "neuron_norm_spread", "of_both", "of_params", "of_updates",
    "orthogonality_error", "scalars", "singular_values", "stable_rank", "update_to_weight_ratio",
    "warm_spectral_norm",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__
