"""Figure of ptq161: a fifth of the input channels has four bits, the others a sign."""

import random

from figures.drawing import BLUE, GRAY, INK, ORANGE, PALE, Sheet

COLUMNS, ROWS, CELL = 15, 6, 36
LEFT, TOP = 150, 130
SALIENT = (3, 8, 12)


def ptq161() -> str:
    """Draws a weight, the inputs above it, and the scales of its rows and columns."""
    draw = random.Random(2)
    sheet = Sheet(760, 400, "Channels with large inputs have four bits, the others one sign bit")
    for column in range(COLUMNS):
        salient = column in SALIENT
        x = LEFT + column * CELL
        height = draw.uniform(52, 70) if salient else draw.uniform(4, 16)
        sheet.box((x, TOP - 14 - height), (CELL - 4, height), ORANGE if salient else BLUE)
        for row in range(ROWS):
            corner = (x, TOP + row * CELL)
            sheet.box(corner, (CELL - 4, CELL - 4), "#f6d9c6" if salient else PALE)
            words = str(draw.randrange(16)) if salient else draw.choice("+\u2212")
            color = ORANGE if salient else INK
            sheet.text(x + CELL / 2 - 2, TOP + row * CELL + 22, words, color, 15, "middle")
    for row in range(ROWS):
        sheet.box((LEFT - 34, TOP + row * CELL), (20, CELL - 4), "#cfe0f2")
    for column in range(COLUMNS):
        if column not in SALIENT:
            corner = (LEFT + column * CELL, TOP + ROWS * CELL + 8)
            sheet.box(corner, (CELL - 4, 16), "#cfe0f2")
    sheet.text(20, TOP - 34, "largest input", GRAY)
    sheet.text(20, TOP + 3 * CELL - 6, "row scales", BLUE)
    sheet.text(20, TOP + ROWS * CELL + 22, "column scales", BLUE)
    sheet.text(
        LEFT, 388, "orange: codes of 4 bits; +/\u2212: one bit, times row and column scale", INK
    )
    return sheet.svg()
