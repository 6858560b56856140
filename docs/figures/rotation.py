"""Figures of quip and trellis: weights before and after a rotation; a ring of bits."""

import math
import random

from figures.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PALE, RED, Sheet

COUNT, BAR, LEFT, TALL = 64, 10, 60, 75


def weights() -> list[float]:
    """Returns made-up weights, three of which are outliers."""
    draw = random.Random(3)
    made = [draw.gauss(0, 0.12) for _ in range(COUNT)]
    for place, value in ((9, 1.0), (30, -0.85), (51, 0.7)):
        made[place] = value
    return made


def rotated(values: list[float]) -> list[float]:
    """Multiplies by random signs and by the Sylvester matrix, over the root of its order."""
    draw = random.Random(11)
    found = [value * draw.choice((-1, 1)) for value in values]
    step = 1
    while step < len(found):
        for start in range(0, len(found), 2 * step):
            for i in range(start, start + step):
                a, b = found[i], found[i + step]
                found[i], found[i + step] = a + b, a - b
        step *= 2
    return [value / math.sqrt(len(found)) for value in found]


def bars(sheet: Sheet, middle: float, values: list[float], color: str) -> None:
    for i, value in enumerate(values):
        height = abs(value) * TALL
        top = middle - height if value > 0 else middle
        sheet.box((LEFT + i * BAR, top), (BAR - 2, max(height, 1)), color)
    sheet.line((LEFT, middle), (LEFT + COUNT * BAR, middle), GRAY, 1)


def quip() -> str:
    """Draws weights with outliers, and the same weights rotated."""
    sheet = Sheet(760, 390, "A rotation spreads outliers over all weights")
    sheet.text(LEFT, 28, "weights of a row: few are large, and a grid must reach them")
    bars(sheet, 120, weights(), BLUE)
    sheet.text(LEFT, 222, "the same weights, rotated: all are of a similar size", ORANGE)
    bars(sheet, 290, rotated(weights()), ORANGE)
    sheet.text(LEFT, 380, "eight of them together are rounded to a point of a lattice", GRAY)
    return sheet.svg()


def trellis() -> str:
    """Draws a ring of bits and three windows, each of which means a weight."""
    draw = random.Random(5)
    sheet = Sheet(760, 400, "Every window of a ring of bits means a weight")
    bits, radius, center = 32, 130, (190, 205)
    for i in range(bits):
        angle = 2 * math.pi * i / bits - math.pi / 2
        x, y = center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle)
        sheet.text(x, y + 5, str(draw.randrange(2)), INK, 15, "middle")
    for number, color in enumerate((BLUE, ORANGE, GREEN)):
        first, reach = 2 * number, radius + 22 + 14 * number
        points = []
        for i in range(45):
            angle = 2 * math.pi * (first - 0.4 + 11.8 * i / 44) / bits - math.pi / 2
            points.append(
                (center[0] + reach * math.cos(angle), center[1] + reach * math.sin(angle))
            )
        sheet.path(points, color, 3)
        y = 90 + 60 * number
        sheet.box((470, y - 22), (120, 32), PALE)
        sheet.text(530, y, f"12 bits, from bit {first}", color, 12, "middle")
        sheet.arrow((595, y - 6), (640, y - 6), color)
        sheet.text(650, y, f"weight {number}", color)
    sheet.text(470, 290, "The next weight adds 2 bits and drops 2:", INK)
    sheet.text(470, 312, "2 bits a weight, but each depends on 12.", INK)
    sheet.text(470, 342, "A search finds the ring whose", RED)
    sheet.text(470, 364, "weights are nearest.", RED)
    return sheet.svg()
