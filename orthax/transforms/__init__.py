"""Transformations of matrices, one idea per file."""

from orthax.transforms.adam_per_index import ScaleByAdamPerIndexState as ScaleByAdamPerIndexState
from orthax.transforms.adam_per_index import scale_by_adam_per_index as scale_by_adam_per_index
from orthax.transforms.clip import clip_by_quantile as clip_by_quantile
from orthax.transforms.cosh import scale_by_cosh_rms as scale_by_cosh_rms
from orthax.transforms.low_rank import LowRankState as LowRankState
from orthax.transforms.low_rank import low_rank as low_rank
from orthax.transforms.normalize import NormalizeNeuronsState as NormalizeNeuronsState
from orthax.transforms.normalize import normalize_neurons as normalize_neurons
from orthax.transforms.orthogonalize import orthogonalize as orthogonalize
from orthax.transforms.penalty import AddPenaltyState as AddPenaltyState
from orthax.transforms.penalty import add_penalty as add_penalty
from orthax.transforms.shape_scale import scale_by_adam_rms as scale_by_adam_rms
from orthax.transforms.shape_scale import scale_by_unit_rms as scale_by_unit_rms
from orthax.transforms.shape_scale import scale_by_width as scale_by_width
from orthax.transforms.shape_scale import scale_to_rms as scale_to_rms
from orthax.transforms.stiefel import keep_norm as keep_norm
from orthax.transforms.stiefel import keep_orthogonal as keep_orthogonal
from orthax.transforms.stiefel import keep_unit_neurons as keep_unit_neurons
from orthax.transforms.stiefel import project_tangent as project_tangent
