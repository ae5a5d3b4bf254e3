"""orthax: orthogonality methods for training networks, as optax transformations."""

from orthax import conv_penalties as conv_penalties
from orthax import diagnostics as diagnostics
from orthax import linalg as linalg
from orthax import penalties as penalties
from orthax.matrices import MatrixView as MatrixView
from orthax.matrices import Packed as Packed
from orthax.matrices import PathRules as PathRules
from orthax.matrices import as_matrices as as_matrices
from orthax.matrices import explain as explain
from orthax.matrices import partition_matrices as partition_matrices
from orthax.optimizers import auon as auon
from orthax.optimizers import dct_adamw as dct_adamw
from orthax.optimizers import hybrid_auon as hybrid_auon
from orthax.optimizers import muon as muon
from orthax.optimizers import normuon as normuon
from orthax.optimizers import root as root
from orthax.optimizers import trion as trion
from orthax.penalties import WithMemory as WithMemory
from orthax.transforms import add_penalty as add_penalty
from orthax.transforms import clip_by_quantile as clip_by_quantile
from orthax.transforms import keep_norm as keep_norm
from orthax.transforms import keep_orthogonal as keep_orthogonal
from orthax.transforms import keep_unit_neurons as keep_unit_neurons
from orthax.transforms import low_rank as low_rank
from orthax.transforms import normalize_neurons as normalize_neurons
from orthax.transforms import orthogonalize as orthogonalize
from orthax.transforms import project_tangent as project_tangent
from orthax.transforms import scale_by_adam_per_index as scale_by_adam_per_index
from orthax.transforms import scale_by_adam_rms as scale_by_adam_rms
from orthax.transforms import scale_by_cosh_rms as scale_by_cosh_rms
from orthax.transforms import scale_by_unit_rms as scale_by_unit_rms
from orthax.transforms import scale_by_width as scale_by_width
from orthax.transforms import scale_to_rms as scale_to_rms

__version__ = "0.1.0"
