"""Figure of gptq: columns are rounded one after another, and errors go to those that are left."""

from figures.drawing import BLUE, GRAY, INK, ORANGE, PALE, RED, Sheet

COLUMNS, ROWS, CELL = 12, 5, 44
LEFT, TOP, NOW = 110, 60, 4


def gptq() -> str:
    """Draws a weight whose fifth column is being rounded."""
    sheet = Sheet(760, 380, "Column by column: the error of a column is fed into the columns left")
    for column in range(COLUMNS):
        done, now = column < NOW, column == NOW
        for row in range(ROWS):
            fill = BLUE if done else ORANGE if now else PALE
            corner = (LEFT + column * CELL, TOP + row * CELL)
            sheet.box(corner, (CELL - 4, CELL - 4), fill)
    sheet.text(LEFT, TOP - 20, "rounded", BLUE)
    sheet.text(LEFT + NOW * CELL + 20, TOP - 20, "rounded now", ORANGE, anchor="middle")
    sheet.text(LEFT + 7 * CELL, TOP - 20, "still float: they take over the error", INK)
    sheet.text(24, TOP + 2.6 * CELL, "weight", GRAY)
    y = TOP + ROWS * CELL + 16
    start = LEFT + NOW * CELL + CELL / 2
    for column in range(NOW + 1, COLUMNS):
        end = LEFT + column * CELL + CELL / 2 - 2
        drop = y + 8 + 7 * (column - NOW)
        sheet.path([(start, y), (start, drop), (end, drop)], RED, 1.2)
        sheet.arrow((end, drop), (end, y), RED, 1.2)
    sheet.text(LEFT, 370, "error of the column, times what the inputs have in common", RED)
    return sheet.svg()
