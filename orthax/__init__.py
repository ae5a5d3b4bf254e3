"""orthax: orthogonality methods for training networks, as optax transformations."""

from orthax import conv_penalties, diagnostics, linalg, penalties
from orthax.base.with_memory import WithMemory
from orthax.matrices.explain import explain
from orthax.matrices.partition import as_matrices, partition_matrices
from orthax.matrices.path_rules import PathRules
from orthax.matrices.view import MatrixView, Packed
from orthax.optimizers.auon import auon
from orthax.optimizers.dct_adamw import dct_adamw
from orthax.optimizers.from_optax import from_optax_muon
from orthax.optimizers.hybrid_auon import hybrid_auon
from orthax.optimizers.muon import muon
from orthax.optimizers.names import OPTIMIZERS, by_name
from orthax.optimizers.normuon import normuon
from orthax.optimizers.root import root
from orthax.optimizers.trion import trion
from orthax.transforms.adam_per_index import ScaleByAdamPerIndexState, scale_by_adam_per_index
from orthax.transforms.clip import clip_by_quantile
from orthax.transforms.constraints import (
    keep_norm,
    keep_orthogonal,
    keep_unit_neurons,
    project_tangent,
)
from orthax.transforms.cosh import scale_by_cosh_rms
from orthax.transforms.low_rank.projection import LowRankState
from orthax.transforms.low_rank.transformation import low_rank
from orthax.transforms.normalize import NormalizeNeuronsState, normalize_neurons
from orthax.transforms.orthogonalize import orthogonalize
from orthax.transforms.penalty import AddPenaltyState, add_penalty
from orthax.transforms.shape_scale import (
    scale_by_adam_rms,
    scale_by_unit_rms,
    scale_by_width,
    scale_to_rms,
)

__version__ = "0.2.0"

# fmt: off
__all__ = [
    "AddPenaltyState", "LowRankState", "MatrixView", "NormalizeNeuronsState", "OPTIMIZERS",
    "Packed", "PathRules", "ScaleByAdamPerIndexState", "WithMemory", "add_penalty", "as_matrices",
    "auon", "by_name", "clip_by_quantile", "conv_penalties", "dct_adamw", "diagnostics", "explain",
    "from_optax_muon", "hybrid_auon", "keep_norm", "keep_orthogonal", "keep_unit_neurons", "linalg",
    "low_rank", "muon", "normalize_neurons", "normuon", "orthogonalize", "partition_matrices",
    "penalties", "project_tangent", "root", "scale_by_adam_per_index", "scale_by_adam_rms",
    "scale_by_cosh_rms", "scale_by_unit_rms", "scale_by_width", "scale_to_rms", "trion",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__
