"""A layer that is cut has the rows or the columns of the weight, or is refused."""

from collections.abc import Callable

import pytest
import torch

from lowbit.formats.activation import Activation
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear, Salient
from lowbit.formats.incoherence import rotation
from lowbit.formats.nested import NestedLayout, NestedLinear, SliceGrid
from lowbit.formats.reading import Reading
from lowbit.formats.uniform import UniformLayout, UniformLinear
from lowbit.vllm_plugin.cutting import inputs_of, rows_of

pytestmark = pytest.mark.slow

ROWS, COLUMNS, SIZE = 13, 24, 8
DRAW = torch.Generator().manual_seed(0)
SHAPE = (ROWS, COLUMNS // SIZE)


def codes(bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=DRAW, dtype=torch.uint8)


def scale(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=DRAW) + 0.1


def uniform(bits: int, zeros: bool, shift: int = 0) -> UniformLinear:
    zero = torch.randint(0, 2 ** (bits + shift), SHAPE, generator=DRAW) if zeros else None
    return UniformLinear.from_codes(
        codes(bits), scale(*SHAPE), zero, UniformLayout(bits, SIZE, shift)
    )


def zeros() -> torch.Tensor:
    return torch.randint(0, 256, SHAPE, generator=DRAW, dtype=torch.uint8)


def nested(extra: bool = False, own: tuple[int, ...] = ()) -> NestedLinear:
    layout, grids = NestedLayout(SIZE, extra), {b: SliceGrid(scale(*SHAPE), zeros()) for b in own}
    return NestedLinear.from_codes(codes(8), scale(*SHAPE), zeros(), layout, own=grids)


def binary(salient: int) -> BinaryLinear:
    weight, plain = torch.randn(ROWS, COLUMNS, generator=DRAW), COLUMNS - salient
    zero = torch.randint(0, 16, (ROWS,), generator=DRAW)
    chosen = Salient.nearest(torch.arange(salient) * 3, weight[:, plain:], scale(ROWS), zero)
    return BinaryLinear.from_parts(
        weight[:, :plain] < 0,
        scale(ROWS),
        row_mean=scale(ROWS),
        column_scale=scale(plain),
        salient=chosen if salient else None,
    )


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    "uniform": lambda: uniform(3, zeros=True),
    "uniform, fine zeros": lambda: uniform(2, zeros=True, shift=6),
    "uniform, symmetric": lambda: uniform(5, zeros=False),
    "nested": lambda: nested().at(4),
    "nested slice": lambda: nested().slice(3),
    "nested, own grids": lambda: nested(own=(4, 2)).at(2),
    "nested slice of an own grid": lambda: nested(own=(4, 2)).slice(4),
    "binary": lambda: binary(5),
    "binary, no salient channels": lambda: binary(0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows(name: str) -> None:
    layer = LAYERS[name]()
    for start, stop in [(0, 7), (7, 13), (5, 6), (0, 13)]:
        part = rows_of(layer, start, stop)
        assert torch.equal(part.dequantize(), layer.dequantize()[start:stop])


@pytest.mark.parametrize("name", LAYERS)
def test_inputs(name: str) -> None:
    """The last eight inputs hold no salient channel."""
    layer = LAYERS[name]()
    for start, stop in [(0, 8), (8, 24), (16, 24), (0, 24)]:
        part = inputs_of(layer, start, stop)
        assert torch.equal(part.dequantize(), layer.dequantize()[:, start:stop])


def rounding() -> QuantizedLinear:
    layer = uniform(4, zeros=True)
    layer.activation = Activation(bits=8, symmetric=False)
    return layer


def rotating() -> QuantizedLinear:
    reading = Reading(rotation=rotation(24, 1))
    return uniform(4, zeros=True).with_reading(reading)


def test_rows_of_a_layer_that_rotates_its_inputs() -> None:
    layer = rotating()
    part = rows_of(layer, 5, 9)
    assert torch.equal(part.dequantize(), layer.dequantize()[5:9])


REFUSED = {
    "half a group": (lambda: uniform(4, zeros=True), "the 12 inputs of one device are no whole"),
    "rotated inputs": (rotating, "rotates all its inputs together"),
    "rounded inputs": (rounding, "rounds each token by the range of all its inputs"),
    "extra precision": (lambda: nested(extra=True).slice(3), "a slice with extra precision"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        inputs_of(make(), 0, 12)
