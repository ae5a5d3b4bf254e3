"""What orthax knows about Flax. Needs the extra `orthax[flax]`; not loaded by `import orthax`."""

from orthax.nn.householder_linear import HouseholderLinear
from orthax.nn.module_types import dimension_numbers

__all__ = ["HouseholderLinear", "dimension_numbers"]


def __dir__() -> list[str]:
    return __all__
