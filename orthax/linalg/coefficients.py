r"""Newton-Schulz step tables: one odd quintic a s + b s^3 + c s^5 per row.

A table maps singular values of a matrix of unit Frobenius norm towards 1; its length is the number
of steps. Tables are plain tuples of floats. What they do to a singular value is `scalar_map`; how
to make one for any range is `minimax`, and for random matrices of a given shape `for_shape`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from orthax.base import check
from orthax.linalg.polar_factor.shape_tables import for_shape
from orthax.linalg.polar_factor.tables import Row, Table, minimax, scalar_map

# fmt: off
__all__ = [
    "CANS", "CUBIC", "DEEPSEEK_V4", "DION", "MUON", "POLAR_EXPRESS", "ROOT", "Row", "TABLES",
    "Table", "by_name", "for_shape", "minimax", "scalar_map",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__


MUON: Table = ((3.4445, -4.7750, 2.0315),) * 5
"""The original Muon's triple, five times. Maps [1e-3, 1] into [0.4705, 1.2024]; slope 485 at zero.

No safety factor. Source: Jordan et al., 2024, <https://kellerjordan.github.io/posts/muon/>.
"""

DION: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You's table, used by Dion and as `dion` by optax. Maps [1e-3, 1] into [0.475, 1.145]; slope 493.

No safety factor. Source: Ahn et al., Dion, 2025, <https://arxiv.org/abs/2504.05295>.
"""

POLAR_EXPRESS: Table = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express for five steps, as modded-nanogpt runs it; the default.

Maps [1e-3, 1] into [0.859, 1.141]; slope 989.

`minimax(5, 1e-3, cushion=0.02, safety=1.02)`: safety factor 1.02 in all rows but the last. The code
that published it also divides the input by 1.02, for bfloat16 norms; they are in float32 here.
Source: Amsel et al., 2025, <https://arxiv.org/abs/2505.16932>; rows from modded-nanogpt.
"""

CANS: Table = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
"""Chebyshev-accelerated Newton-Schulz for five steps.

Maps [1e-3, 1] into [0.884, 1.120]; slope 1049. No safety factor.
Source: Grishina et al., 2025, <https://arxiv.org/abs/2506.10935>.
"""

DEEPSEEK_V4: Table = (*((3.4445, -4.7750, 2.0315),) * 8, *((2.0, -1.5, 0.5),) * 2)
"""Ten steps, of which the last two bring what Muon's triple leaves scattered near 1.

Maps [1e-3, 1] into [1, 1.0006]; slope 79,263 at zero. No safety factor.
Source: DeepSeek-V4, as MaxText runs it (`ns_coeffs`).
"""

CUBIC: Table = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)
"""Five cubic steps: with c = 0 a step takes two products instead of three.

Maps [1e-3, 1] into [0.119, 1.30]; slope 119 at zero. No safety factor.
Source: <https://arxiv.org/abs/2606.00371>.
"""

ROOT: Mapping[tuple[int, int], Table] = MappingProxyType(
    {
        (2048, 2048): ((3.4916, -4.8224, 2.1095),) * 5,
        (2048, 3072): ((3.4509, -4.5790, 1.9325),) * 5,
        (2048, 8192): ((2.9794, -3.6674, 1.6207),) * 5,
        (2048, 16384): ((3.1943, -3.8221, 1.5322),) * 5,
    }
)
"""ROOT's triples by (shorter, longer) side, five times each; its code has `MUON`'s for the rest.

Beware: the one of (2048, 2048) takes singular values in [0, 1] up to 3.31. Slopes at zero are 519,
489, 235 and 333. No safety factor. Tables for any shape are `for_shape`'s.
Source: He et al., 2025, <https://arxiv.org/abs/2511.20626>; triples from the code.
"""

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "cans": CANS,
        "cubic": CUBIC,
        "deepseek_v4": DEEPSEEK_V4,
        "dion": DION,
        "muon": MUON,
        "polar_express": POLAR_EXPRESS,
    }
)
"""The tables for every shape, by name."""


def by_name(name: str) -> Table:
    """Returns the table that a configuration names.

    Args:
      name: One of `TABLES`.

    Raises:
      ValueError: For another name; it lists them. TypeError: if `name` is no string.

    Example:
      >>> len(by_name("deepseek_v4"))
      10
    """
    check.choice("coefficients.by_name: name", name, tuple(TABLES))
    return TABLES[name]
