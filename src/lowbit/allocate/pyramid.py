"""Few bits at both ends of the model, many in the middle (MatQuant, arXiv 2502.06786).

2...2, 4...4, 8...8, 4...4, 2...2: the best of the shapes by which the paper mixes widths.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

from lowbit.allocate.units import Layout


def pyramid(layout: Layout, widths: Sequence[int], limit: int) -> list[int]:
    """The width of each unit; a block and its mirror image have one width.

    Both ends have the lowest. Of all such pyramids it is the one that takes most bytes within the
    limit; of equal ones, the flattest. A unit in no block goes with the middle. Raises ValueError
    where not even the lowest width everywhere is within the limit.
    """
    rising = sorted(widths)
    ring_of = [
        (layout.blocks - 1) // 2
        if unit.block is None
        else min(unit.block, layout.blocks - 1 - unit.block)
        for unit in layout.units
    ]
    rings = (layout.blocks + 1) // 2
    below = [[0] * (rings + 1) for _ in rising]  # bytes of all rings outside one, at each width
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
