"""Which devices own matrices where a mesh has more devices than there are matrices.

Whole matrices would leave devices idle. Mesh axes that cut the longer side may stay inside of the
matrices instead: their devices work on one matrix together, each on some of its columns, and sum
Gram matrices. Estimated times, of the products of an orthogonaliser in its Gram form and of what is
sent, decide:

    2 of (1024, 4096) on 2 x 4 devices   products of a device   sent by a device
    whole, 6 devices idle                64.4 G                 29.4 MB
    each on 4 devices                    38.7 G                 16.8 MB
"""

import itertools
import math
from collections.abc import Mapping, Sequence

OPERATIONS_PER_BYTE = 2000
"""That a device does while it sends a byte: of recent accelerators within one node or slice."""

LONG_PRODUCTS, SQUARE_PRODUCTS, GRAMS = 4, 14, 2
"""Of `gram_newton_schulz` with one restart: with the matrix, among squares, and Gram matrices that
are summed over devices."""


def axes_inside(
    matrices: int,
    shape: tuple[int, int],
    cutting: Sequence[str],
    owners: Sequence[str],
    sizes: Mapping[str, int],
) -> tuple[str, ...]:
    """Mesh axes whose devices work on one matrix together.

    Args:
      matrices: How many there are in the stack.
      shape: Rows and columns of each.
      cutting: Mesh axes that cut the longer side, of which some may stay inside.
      owners: All mesh axes whose devices share the matrices.
      sizes: Of the mesh axes.
    """

    def time(inside: tuple[str, ...]) -> float:
        together = math.prod(sizes[a] for a in inside)
        stacks = math.prod(sizes[a] for a in owners) // together
        return -(-matrices // stacks) * _time(shape, together)

    if matrices >= math.prod(sizes[a] for a in owners):
        return ()
    counts = range(len(cutting) + 1)
    subsets = [chosen for n in counts for chosen in itertools.combinations(cutting, n)]
    return min(subsets, key=time)  # of equal ones the first, with fewer axes inside


def axes_of_owners(
    matrices: int, cutting: Sequence[str], copies: Sequence[str], sizes: Mapping[str, int]
) -> set[str]:
    """Mesh axes whose devices share the matrices: those that cut them, and of copies the fewest.

    Along axes that are left out each device does the same: more owners would have no less to do.
    """
    least = math.prod(sizes[a] for a in cutting)

    def own(chosen: Sequence[str]) -> int:
        return -(-matrices // (least * math.prod(sizes[a] for a in chosen)))

    counts = range(len(copies) + 1)
    subsets = [chosen for n in counts for chosen in itertools.combinations(copies, n)]
    enough = [chosen for chosen in subsets if own(chosen) == own(copies)]
    return {*cutting, *min(enough, key=lambda chosen: math.prod(sizes[a] for a in chosen))}


def _time(shape: tuple[int, int], together: int) -> float:
    """Of one matrix on so many devices, in operations of one of them."""
    short, long = sorted(shape)
    products = LONG_PRODUCTS * 2 * short**2 * long / together + SQUARE_PRODUCTS * 2 * short**3
    sent = 2 * 4 * short * long / together  # in and out, in float32
    summed = GRAMS * 2 * 4 * short**2 if together > 1 else 0
    return products + OPERATIONS_PER_BYTE * (sent + summed)
