"""Coordinates of the drawings."""

import math
from typing import Any

import pytest

from lowbit.report.drawing import (
    CURVE_HEIGHT,
    CURVE_INSET,
    MOST_WITH_TEXT,
    bits_grid,
    curve_of,
    error_grid,
    layer_error,
    loss,
)
from lowbit.report.history import BlockHistory
from lowbit.report.layers import Linear, layers_of
from lowbit.report.run import Block
from lowbit.run_report import BlockReport, LinearReport


def linear(name: str, error: float | None, bytes_: int = 8, fallback: str | None = None) -> Linear:
    report = None if error is None else LinearReport(signal_to_noise_db=error)
    entry = {"format": "uniform", "shape": [4, 8]}
    return Linear(name=name, entry=entry, bytes=bytes_, report=report, fallback=fallback)


def block(number: int, *linears: Linear, curve: Any = (), **facts: Any) -> Block:
    return Block(
        name=f"h.{number}",
        number=number,
        layers=layers_of(linears),
        report=BlockReport(**facts),
        history=BlockHistory(curve=list(curve)),
        fallback=None,
    )


def test_the_least_signal_has_the_strongest_shade() -> None:
    grid = error_grid(
        [
            block(0, linear("up", 20.0), linear("moe.0.w", 12.0), linear("moe.1.w", 10.0)),
            block(1, linear("up", 15.0, fallback="why"), linear("down", math.inf)),
        ]
    )
    assert grid is not None and grid.legend == ("20.0 dB", "10.0 dB") and grid.with_text
    up, experts, down = grid.rows
    assert [cell and cell.shade for cell in up.cells] == [0.0, 0.5]
    assert [cell and cell.flagged for cell in up.cells] == [False, True]
    assert [cell and cell.text for cell in experts.cells] == ["10.0", None]
    assert experts.name == "moe.*.w" and "10.0 – 12.0 dB" in experts.cells[0].title
    assert [cell and (cell.shade, cell.text) for cell in down.cells] == [None, (0.0, "exact")]
    assert (up.span, experts.span) == ("15.0 – 20.0", "10.0")


def test_small_differences_look_small() -> None:
    grid = error_grid([block(0, linear("up", 7.0), linear("down", 6.7))])
    assert grid is not None and grid.legend == ("7.0 dB", "1.0 dB")
    assert [row.cells[0].shade for row in grid.rows] == [0.0, 0.05]


def test_no_grid_where_nothing_is_known_or_nothing_differs() -> None:
    assert error_grid([block(0, linear("up", None))]) is None and error_grid([]) is None
    assert bits_grid([block(0, linear("up", 1.0)), block(1, linear("up", 2.0))]) is None


def test_bits_where_they_differ() -> None:
    grid = bits_grid([block(0, linear("up", None, 8), linear("down", None, 16))])
    assert grid is not None and grid.legend == ("2.00 bits", "4.00 bits")
    assert [(row.name, row.cells[0].shade, row.span) for row in grid.rows] == [
        ("up", 0.0, "2.00"),
        ("down", 1.0, "4.00"),
    ]


def test_numbers_stand_in_cells_while_they_fit() -> None:
    many = [block(i, linear("up", 5.0)) for i in range(MOST_WITH_TEXT + 1)]
    assert error_grid(many[:-1]).with_text and not error_grid(many).with_text


def test_a_curve_from_the_start_to_the_best() -> None:
    curve = curve_of(block(0, curve=[4.0, 2.0, 3.0], loss_before=5.0, loss_rtn=6.0))
    assert curve is not None and (curve.low, curve.high) == ("2.00", "6.00")
    x, y = zip(*(map(float, point.split(",")) for point in curve.points.split()), strict=True)
    assert list(x) == sorted(x) and len(x) == 4
    assert curve.best == (x[2], y[2]) and y[2] == CURVE_HEIGHT - CURVE_INSET
    assert curve.line == CURVE_INSET < y[0]
    assert curve.title == "loss from 5.00 to 2.00, rounding to nearest 6.00"


@pytest.mark.parametrize("curve", [[], [1.0]])
def test_one_point_is_no_curve(curve: list[float]) -> None:
    assert curve_of(block(0, curve=curve)) is None


def test_a_flat_curve() -> None:
    curve = curve_of(block(0, curve=[0.0, 0.0]))
    assert curve is not None and curve.line is None and curve.points.endswith(",90.0")


def test_errors_of_several_linears() -> None:
    (alone,) = layers_of([linear("up", 7.04)])
    (several,) = layers_of([linear("moe.0.w", 7.0), linear("moe.1.w", math.inf)])
    (unknown,) = layers_of([linear("up", None)])
    assert list(map(layer_error, (alone, several, unknown))) == ["7.0 dB", "7.0 – exact", ""]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (12345.0, "1.23e+04"), (2.0, "2.00")]
)
def test_losses_have_three_digits(value: float, text: str) -> None:
    assert loss(value) == text
