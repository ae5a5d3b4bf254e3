"""What orthax knows about Flax. Needs the extra `orthax[flax]`; not loaded by `import orthax`."""

from orthax.nn._dimension_numbers import dimension_numbers as dimension_numbers
from orthax.nn._householder_linear import HouseholderLinear as HouseholderLinear
