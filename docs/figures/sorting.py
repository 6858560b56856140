"""Figure of mixedquant: inputs are sorted by size before they are cut into groups."""

import random

from figures.drawing import BLUE, GRAY, GREEN, ORANGE, Sheet

COUNT, GROUP, KEPT = 40, 9, 36  # inputs, of a group, ordinary ones
BAR, LEFT, TALL = 16, 60, 120


def sizes() -> list[float]:
    """Returns made-up sizes of inputs, from 0 to 1; some are far larger than the others."""
    draw = random.Random(7)
    common = [draw.lognormvariate(-2.0, 0.6) for _ in range(KEPT)]
    mixed = [min(each, 0.6) for each in common] + [0.8, 0.86, 0.93, 1.0]
    draw.shuffle(mixed)
    return mixed


def bars(sheet: Sheet, base: float, values: list[float], salient: int) -> None:
    """Draws bars, the largest of each group as a line over the group; the last ones are salient."""
    for i, value in enumerate(values):
        x = LEFT + i * BAR
        color = ORANGE if salient and i >= len(values) - salient else BLUE
        sheet.box((x, base - value * TALL), (BAR - 3, value * TALL), color)
    for start in range(0, len(values) - salient, GROUP):
        group = values[start : min(start + GROUP, len(values) - salient)]
        y = base - max(group) * TALL - 3
        sheet.line((LEFT + start * BAR, y), (LEFT + (start + len(group)) * BAR - 3, y), GREEN, 2.5)


def mixedquant() -> str:
    """Draws the inputs of a layer in their own order and sorted."""
    sheet = Sheet(760, 400, "Sorted inputs share a scale with inputs of their own size")
    values = sizes()
    sheet.text(LEFT, 26, "inputs in their own order: one large input widens the scale of its group")
    bars(sheet, 180, values, 0)
    sheet.text(LEFT, 222, "sorted; the largest stay in float")
    bars(sheet, 376, sorted(values), COUNT - KEPT)
    sheet.text(LEFT, 396, "green: the scale of a group; orange: salient inputs, in float", GRAY, 13)
    return sheet.svg()
