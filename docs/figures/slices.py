"""Figure of matquant: the upper bits of an 8-bit code are a code too."""

from figures.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PALE, Sheet

CODE = 0b10110101  # 181
CELL, LEFT, TOP = 52, 40, 60
SLICES = {8: INK, 4: BLUE, 2: ORANGE}
LINE_LEFT, LINE_RIGHT = 120, 720


def matquant() -> str:
    """Draws one code of 8 bits, its slices, and the values that codes of each width can have."""
    sheet = Sheet(760, 420, "The upper bits of an 8-bit code are codes of fewer bits")
    for bit in range(8):
        corner = (LEFT + bit * CELL, TOP)
        sheet.box(corner, (CELL - 4, CELL - 4), PALE, GRAY)
        digit = str(CODE >> (7 - bit) & 1)
        sheet.text(corner[0] + CELL / 2 - 2, TOP + 32, digit, INK, 20, "middle")
    sheet.text(LEFT, TOP - 22, "one code of the folder")
    for row, (bits, color) in enumerate(SLICES.items()):
        y = TOP + CELL + 14 + 24 * row
        sheet.line((LEFT, y), (LEFT + bits * CELL - 4, y), color, 4)
        step = 2 ** (8 - bits)
        sliced = min((CODE + step // 2) // step, 2**bits - 1)
        words = f"{bits} bits: {sliced} x {step} = {sliced * step}"
        sheet.text(LEFT + 8 * CELL + 20, y + 5, words, color)
    sheet.text(LEFT, 246, "values that a code can stand for, from 0 to 255; rounded half up", GRAY)
    for row, (bits, color) in enumerate(SLICES.items()):
        y = 285 + 44 * row
        sheet.text(LEFT, y + 5, f"{bits} bits", color)
        sheet.line((LINE_LEFT, y), (LINE_RIGHT, y), PALE)
        step = 2 ** (8 - bits)
        for value in range(0, 256, step):
            x = LINE_LEFT + (LINE_RIGHT - LINE_LEFT) * value / 255
            sheet.line((x, y - 9), (x, y + 9), color, 1 if bits == 8 else 2.5)
    x = LINE_LEFT + (LINE_RIGHT - LINE_LEFT) * CODE / 255
    sheet.line((x, 268), (x, 388), GREEN, 1)
    sheet.text(x, 406, f"{CODE}", GREEN, 13, "middle")
    return sheet.svg()
