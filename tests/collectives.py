"""Counts what devices send each other in a compiled program."""

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
LINE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


def bytes_of(shapes):
    return sum(
        int(bits) // 8 * math.prod(int(n) for n in sizes.split(",") if n)
        for bits, sizes in ARRAY.findall(shapes)
    )


def collectives(compiled):
    """For each kind of collective how many there are, and the bytes of their results together.

    Of programs without loops: what is inside one is counted once.
    """
    counts, sizes = collections.Counter(), collections.Counter()
    for shapes, kind, start in LINE.findall(compiled.as_text()):
        counts[kind] += 1
        sizes[kind] += bytes_of(shapes) // (2 if start else 1)
    return counts, sizes
