"""Pyramid: few bits for the first and last blocks, many for the middle (arXiv 2502.06786).

The widths are 2...2, 4...4, 8...8, 4...4, 2...2, which is the best of the paper's shapes.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

from lowbit.allocate.units import Layout


def pyramid(layout: Layout, widths: Sequence[int], limit: int) -> list[int]:
    """Chooses widths that rise from the first and last block to the middle, within a size limit.

    Block i and block n - 1 - i get the same width, and the outermost blocks get the lowest width.
    Among the shapes within the limit the largest is chosen; among equally large ones, the one with
    the smallest sum of squared widths over these pairs of blocks. A unit (linears that share a
    width) outside all blocks gets the width of the middle.

    layout: the units, and the number of blocks n.
    widths: the allowed bits per weight.
    limit: the largest allowed sum of the sizes of all units, in bytes.

    Returns one width per unit, in the order of layout.units.
    Raises ValueError if the limit is too small even for the lowest width everywhere.
    """
    rising = sorted(widths)
    ring_of = [
        (layout.blocks - 1) // 2
        if unit.block is None
        else min(unit.block, layout.blocks - 1 - unit.block)
        for unit in layout.units
    ]
    rings = (layout.blocks + 1) // 2
    below = [[0] * (rings + 1) for _ in rising]  # bytes of all rings outside a ring, by width
    for sums, width in zip(below, rising, strict=True):
        for ring, unit in zip(ring_of, layout.units, strict=True):
            sums[ring + 1] += unit.bytes[width]
        for ring in range(rings):
            sums[ring + 1] += sums[ring]
    best: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()
    for steps in combinations_with_replacement(range(1, rings + 1), len(rising) - 1):
        edges = (0, *steps, rings)
        spans = list(zip(edges, edges[1:], strict=False))
        taken = sum(s[b] - s[a] for s, (a, b) in zip(below, spans, strict=True))
        steep = sum(w * w * (b - a) for w, (a, b) in zip(rising, spans, strict=True))
        if taken <= limit and (best is None or (taken, -steep) > best):
            best, shape = (taken, -steep), steps
    if best is None:
        raise ValueError(f"limit is {limit}: the lowest width everywhere takes {below[0][-1]}")
    return [rising[sum(step <= ring for step in shape)] for ring in ring_of]
