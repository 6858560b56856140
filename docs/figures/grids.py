"""Figures of rtn and omniquant: weights on a line, and the codes that they are rounded to."""

import random

from figures.drawing import BLUE, GRAY, GREEN, ORANGE, RED, Sheet

LEFT, RIGHT = 60, 700
MIDDLE = (LEFT + RIGHT) / 2
REACH = 1.4  # the largest magnitude that is drawn


def place(value: float) -> float:
    """Returns where a weight is drawn."""
    return MIDDLE + value * (RIGHT - LEFT) / 2 / REACH


def weights() -> list[float]:
    """Returns made-up weights of a group: most are small, one is not."""
    draw = random.Random(4)
    return sorted([draw.gauss(0, 0.33) for _ in range(30)] + [1.3])


def axis(sheet: Sheet, y: float, codes: list[float], color: str) -> None:
    """Draws the line of weights with a tick for each code."""
    sheet.line((LEFT, y), (RIGHT, y), GRAY)
    for number, code in enumerate(codes):
        sheet.line((place(code), y - 9), (place(code), y + 9), color, 2.5)
        sheet.text(place(code), y + 26, str(number), color, 13, "middle")


def rounded(sheet: Sheet, y: float, codes: list[float]) -> None:
    """Draws weights above the line, each with a stroke to its nearest code."""
    for weight in weights():
        nearest = min(codes, key=lambda code: abs(code - weight))
        sheet.line((place(weight), y - 40), (place(nearest), y - 10), GRAY, 0.8)
        sheet.dot(place(weight), y - 44, BLUE, 3.5)


def steps(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def rtn() -> str:
    """Draws a group whose codes span the whole range of its weights."""
    sheet = Sheet(760, 170, "Weights of a group, each rounded to the nearest of eight codes")
    codes = steps(min(weights()), max(weights()), 8)
    sheet.text(LEFT, 26, "weights of one group", BLUE)
    rounded(sheet, 105, codes)
    axis(sheet, 105, codes, ORANGE)
    sheet.text(LEFT, 156, "codes of 3 bits, from the least weight to the largest", ORANGE)
    return sheet.svg()


def omniquant() -> str:
    """Draws the same group with its whole range, and with a range that was learned."""
    sheet = Sheet(760, 330, "The same weights with the whole range and with a learned range")
    low, high = min(weights()), max(weights())
    whole, clipped = steps(low, high, 8), steps(0.92 * low, 0.55 * high, 8)
    sheet.text(LEFT, 26, "the whole range: one large weight makes all steps wide", ORANGE)
    rounded(sheet, 105, whole)
    axis(sheet, 105, whole, ORANGE)
    sheet.text(
        LEFT, 186, "a learned range: the large weight is clipped, all others fare better", GREEN
    )
    rounded(sheet, 265, clipped)
    axis(sheet, 265, clipped, GREEN)
    sheet.arrow((place(high), 300), (place(clipped[-1]) + 6, 300), RED)
    sheet.text(place(high), 318, "clipped", RED, 13, "end")
    return sheet.svg()
