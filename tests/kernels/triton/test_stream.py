"""Uniform codes: every width, kind of zero point, and shape, against the definition."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.kernels.bits import pack, unpack
from lowbit.kernels.triton import stream
from lowbit.kernels.triton.launch import MOST_FEW, total
from lowbit.kernels.triton.stream import Stream

KINDS = ("constant", "zeros", "added", "columns")


def weight_of(rows: int, inputs: int, bits: int, size: int, kind: str = "zeros") -> Stream:
    """A weight with every code, in random order."""
    draw = torch.Generator().manual_seed(rows * inputs + bits)
    codes = torch.arange(rows * inputs)[torch.randperm(rows * inputs, generator=draw)] % 2**bits
    groups = -(-inputs // size)
    given = {
        "packed": pack(codes.view(rows, inputs).to(torch.uint8), bits),
        "scale": torch.rand(rows, groups, generator=draw).half() + 0.1,
    }
    if kind == "zeros":
        zero = torch.randint(0, 2**bits, (rows, groups), generator=draw, dtype=torch.uint8)
        return Stream(inputs=inputs, bits=bits, group_size=size, zero=zero, zero_unit=0.5, **given)
    if kind == "added":
        added = torch.randn(rows, groups, generator=draw)
        return Stream(inputs=inputs, bits=bits, group_size=size, added=added, **given)
    columns = torch.rand(inputs, generator=draw) + 0.5 if kind == "columns" else None
    return Stream(
        inputs=inputs,
        bits=bits,
        group_size=size,
        middle=2**bits - 1,
        zero_unit=0.5,
        factor=4.0,
        columns=columns,
        **given,
    )


def defined(weight: Stream) -> Tensor:
    """The weight as the module's docstring defines it, in float64."""
    codes = unpack(weight.packed, weight.bits, weight.inputs).double()
    each = lambda t: t.double().repeat_interleave(weight.group_size, 1)[:, : weight.inputs]  # noqa: E731
    if weight.added is not None:
        return each(weight.scale) * codes + each(weight.added)
    zero = weight.middle if weight.zero is None else each(weight.zero)
    found = weight.factor * each(weight.scale) * (codes - weight.zero_unit * zero)
    return found if weight.columns is None else found * weight.columns.double()


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within twice torch's own error in float32, and the rounding of the weight."""
    exact = x.double() @ weight.T
    torchs = (x.float() @ weight.float().T - exact).abs().max()
    rounding = 2**-23 * (x.double().abs() @ weight.abs().T).max()
    assert (found.double() - exact).abs().max() <= 2 * torchs + rounding


@pytest.mark.parametrize(
    ("bits", "tokens"), [*((bits, 3) for bits in range(1, 9)), (4, 1), (3, MOST_FEW), (8, 1)]
)
def test_a_few_tokens_at_every_width(bits: int, tokens: int) -> None:
    """Rows that begin at whole words of 32 bits, and rows that begin at a byte."""
    for rows, inputs, size, word in ((4, 96, 32, 32), (11, 53, 24, 8)):
        weight = weight_of(rows, inputs, bits, size)
        assert weight.word == word
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))
        check(total(stream.few(x, weight)), x, defined(weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_kind_of_weight(kind: str, bits: int) -> None:
    for size in (32, 70):
        weight = weight_of(6, 70, bits, size, kind)
        x = torch.randn(2, 70, generator=torch.Generator().manual_seed(bits))
        check(total(stream.few(x, weight)), x, defined(weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_written_weights_are_exact(bits: int, kind: str) -> None:
    """To the last bit, for groups of any size, into rows that lie apart."""
    for rows, inputs, size in ((17, 131, 20), (1, 5, 5), (3, 33, 7)):
        weight = weight_of(rows, inputs, bits, size, kind)
        around = torch.zeros(rows, inputs + 3)
        stream.write(around[:, 1 : 1 + inputs], weight)
        found, wanted = around[:, 1 : 1 + inputs], defined(weight)
        exact = 2**-24 * (0 if kind == "zeros" or kind == "constant" else 2)
        assert ((found - wanted).abs() <= (2**-24 + exact) * 2 * wanted.abs().max()).all()
        assert not around[:, 0].any() and not around[:, inputs + 1 :].any()
        half = torch.zeros(rows, inputs, dtype=torch.float16)
        stream.write(half, weight)
        assert torch.equal(half, found.half())


def test_inputs_are_cut_into_parts_that_are_added() -> None:
    weight = weight_of(4, 2560, 4, 128)
    x = torch.randn(2, 2560, generator=torch.Generator().manual_seed(0))
    parts = stream.few(x, weight)
    assert len(parts) == 3
    check(total(parts), x, defined(weight))


def test_the_order_of_inputs() -> None:
    weight, draw = weight_of(5, 40, 4, 40, "columns"), torch.Generator().manual_seed(0)
    x, order = torch.randn(3, 60, generator=draw), torch.randperm(60, generator=draw)[:40]
    for dtype in (torch.int32, torch.int64):
        check(total(stream.few(x, weight, order.to(dtype))), x[:, order], defined(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_of_half_precision_that_do_not_lie_together(dtype: torch.dtype) -> None:
    weight = weight_of(5, 64, 3, 32)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).to(dtype).T[::2]
    check(total(stream.few(x, weight)), x, defined(weight))


def test_groups_that_do_not_consist_of_units_are_left_to_written_weights() -> None:
    weight = weight_of(4, 60, 4, 20)
    assert weight.word == 0 and weight_of(4, 60, 4, 60).word == 8
    moved = torch.zeros(4 * 16 + 1, dtype=torch.uint8)[1:].view(4, 16)
    unaligned = replace(weight_of(4, 32, 4, 32), packed=moved)
    assert unaligned.packed.data_ptr() % 4 and unaligned.word == 8
