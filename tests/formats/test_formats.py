"""What every stored format must satisfy: a new one adds a line to EXAMPLES."""

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lowbit.formats import FORMATS, build
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear, Salient
from lowbit.formats.dense import DenseLinear
from lowbit.formats.lattice import LatticeLinear
from lowbit.formats.lattice.codebooks import codebook
from lowbit.formats.lattice.incoherence import rotation
from lowbit.formats.nested import NestedLinear
from lowbit.formats.sorted_group import InputOrder, SortedGroupLinear
from lowbit.formats.uniform import UniformLinear


def uniform(
    rows: int,
    columns: int,
    bits: int,
    group_size: int | None,
    zero_shift: int | None = 0,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> UniformLinear:
    """Random codes; a zero_shift of None is a symmetric layer."""
    draw = torch.Generator().manual_seed(rows + columns)
    shift = zero_shift or 0
    groups = 1 if group_size is None else -(-columns // group_size)
    return UniformLinear.from_codes(
        torch.randint(0, 2**bits, (rows, columns), generator=draw, dtype=torch.uint8),
        (torch.rand(rows, groups, generator=draw) + 0.1) * scale,
        None
        if zero_shift is None
        else torch.randint(0, 2 ** (bits + shift), (rows, groups), generator=draw),
        bits=bits,
        group_size=group_size,
        zero_shift=shift,
        bias=bias,
    )


def lattice(rows: int, columns: int, book: str, scales: int = 1, **more: Any) -> LatticeLinear:
    """The nearest words to a random weight."""
    draw = torch.Generator().manual_seed(rows + columns)
    return LatticeLinear.from_rotated(
        torch.randn(rows, columns, generator=draw),
        torch.rand(scales, generator=draw) + 0.5,
        rotation(columns, 1),
        rotation(rows, 2),
        codebook=codebook(book),
        **more,
    )


def factored(rows: int, columns: int) -> LatticeLinear:
    """Its transforms have stored factors, of the odd parts of its widths."""
    plain = lattice(rows, columns, "D4")
    stored = {"transform_in": "float16", "transform_out": "float32"}
    layer = LatticeLinear.from_entry(plain.entry() | stored)
    draw = torch.Generator().manual_seed(0)
    factors = {
        name: torch.linalg.qr(torch.randn(2 * (width // (width & -width),), generator=draw)).Q
        for name, width in (("factor_in", columns), ("factor_out", rows))
    }
    layer.load_state_dict(plain.state_dict() | factors)
    return layer


def sorted_group(
    rows: int,
    columns: int,
    salient: int,
    group_size: int | None,
    activation_bits: int | None = 4,
    permuted: bool = True,
    bits: int = 4,
    **more: Any,
) -> SortedGroupLinear:
    """The nearest codes to a random weight."""
    draw = torch.Generator().manual_seed(rows + columns)
    groups = -(-(columns - salient) // (group_size or columns))
    permutation = torch.randperm(columns, generator=draw) if permuted else None
    return SortedGroupLinear.from_grid(
        torch.randn(rows, columns, generator=draw),
        torch.rand(rows, groups, generator=draw) * 0.1 + 0.4,
        InputOrder(permutation, salient, group_size, activation_bits),
        bits=bits,
        **more,
    )


def binary(
    rows: int, columns: int, salient: int, size: float = 0.1, vectors: bool = True, **more: Any
) -> BinaryLinear:
    """Random signs and codes; vectors: means of rows and scales of columns."""
    draw = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=draw)
    row, plain = torch.rand(rows, generator=draw) + 0.1, columns - salient
    zero = torch.full((rows,), 8)
    chosen = Salient.nearest(torch.arange(salient) * 2, weight[:, plain:], row * size, zero)
    return BinaryLinear.from_parts(
        weight[:, :plain] < 0,
        row * size,
        row_mean=weight.mean(1) * size if vectors else None,
        column_scale=torch.rand(plain, generator=draw) + 0.5 if vectors else None,
        salient=chosen if salient else None,
        **more,
    )


def nested(
    rows: int, columns: int, group_size: int | None, zeros: bool = True, **more: Any
) -> NestedLinear:
    """Random codes; without zeros a symmetric layer."""
    draw = torch.Generator().manual_seed(rows + columns)
    groups = 1 if group_size is None else -(-columns // group_size)
    shape = (rows, groups)
    return NestedLinear.from_codes(
        torch.randint(0, 256, (rows, columns), generator=draw, dtype=torch.uint8),
        torch.rand(shape, generator=draw) + 0.1,
        torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) if zeros else None,
        group_size=group_size,
        **more,
    )


EXAMPLES: dict[str, Callable[[], QuantizedLinear]] = {
    "binary": lambda: binary(24, 64, 16),
    "binary, ragged, bfloat16 bias": lambda: binary(5, 37, 7, bias=torch.ones(5).bfloat16()),
    "binary, signs alone": lambda: binary(7, 33, 0, vectors=False, bias=torch.randn(7)),
    "binary, float32 scales": lambda: binary(3, 20, 4, size=1e-8),
    "dense": lambda: DenseLinear.from_weight(torch.randn(5, 7).bfloat16(), None),
    "dense, bias": lambda: DenseLinear.from_weight(torch.randn(3, 8), torch.ones(3).half()),
    "nested": lambda: nested(24, 64, 32, trained=(8, 4, 2)),
    "nested at 3 bits, ragged, bfloat16 bias": lambda: nested(
        5, 37, 16, bias=torch.ones(5).bfloat16()
    ).at(3),
    "nested, slice of 6 bits by rows": lambda: nested(7, 33, None, zeros=False).slice(6),
    "nested, slice of 2 bits with extra precision": lambda: nested(
        9, 16, 8, extra_precision=True, bias=torch.randn(9)
    ).slice(2),
    "sorted_group w4a4 g16": lambda: sorted_group(12, 64, 8, 16),
    "sorted_group w3a6, ragged, bfloat16 bias": lambda: sorted_group(
        5, 37, 3, 16, activation_bits=6, bits=3, bias=torch.ones(5).bfloat16()
    ),
    "sorted_group w4a16, int8 beside": lambda: sorted_group(
        7, 33, 5, 8, activation_bits=None, salient_bits=8
    ),
    "sorted_group w8a8 by rows, no permutation, shares": lambda: sorted_group(
        6, 40, 0, None, activation_bits=8, permuted=False, bits=8, shares="model.q_proj"
    ),
    "uniform w4 g32": lambda: uniform(24, 64, 4, 32),
    "uniform w3, ragged, bfloat16 bias": lambda: uniform(
        5, 37, 3, 16, bias=torch.ones(5).bfloat16()
    ),
    "uniform w2 symmetric by rows": lambda: uniform(7, 33, 2, None, zero_shift=None),
    "uniform w8, float32 scale": lambda: uniform(3, 20, 8, 5, bias=torch.randn(3), scale=1e-8),
    "uniform w2, fine zeros": lambda: uniform(9, 16, 2, 8, zero_shift=6),
    "uniform w5, group beyond the row": lambda: uniform(1, 1, 5, 128, bias=torch.ones(1).half()),
    "lattice E8P12": lambda: lattice(24, 64, "E8P12"),
    "lattice 3 bits, ragged, bfloat16 bias": lambda: lattice(
        5, 37, "E8P12RVQ3B", bias=torch.ones(5).bfloat16()
    ),
    "lattice 4 bits by rows": lambda: lattice(12, 20, "E8P12RVQ4B", scales=12),
    "lattice D4, trained signs": lambda: lattice(
        8, 30, "D4", signs=(torch.ones(30), torch.ones(8)), bias=torch.randn(8)
    ),
    "lattice HI that shares": lambda: lattice(7, 33, "HI", shares="model.q_proj"),
    "lattice D4, stored factors": lambda: factored(12, 40),
}

every_example = pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)


def by_bytes(layer: QuantizedLinear) -> bytes:
    return save(layer.state_dict())


def shapes(layer: QuantizedLinear) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in layer.named_parameters()}


def test_every_format_has_an_example() -> None:
    assert {make().format for make in EXAMPLES.values()} == set(FORMATS)
    assert all(name == format_class.format for name, format_class in FORMATS.items())


@every_example
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_multiplies_by_what_dequantize_shows(
    make: Callable[[], QuantizedLinear], dtype: torch.dtype
) -> None:
    layer = make()
    weight = layer.dequantize()
    assert weight.shape == (layer.out_features, layer.in_features)
    assert weight.dtype == torch.float32
    x = torch.randn(2, 3, layer.in_features, dtype=dtype)
    seen = layer.quantized_input(x)  # x itself, unless the format rounds its inputs
    bias = None if layer.bias is None else layer.bias.to(dtype)
    y = torch.nn.functional.linear(seen.to(dtype), weight.to(dtype), bias)
    found = layer(x)
    assert found.dtype == dtype
    if type(layer).forward is QuantizedLinear.forward:
        assert torch.equal(found, y)
    exact = seen.double() @ weight.double().T
    exact = exact if layer.bias is None else exact + layer.bias.double()
    # Twice torch's own error, and the rounding of the weight to the float32 that is shown.
    rounding = 2**-23 * (seen.double().abs() @ weight.double().abs().T).max()
    assert (found - exact).abs().max() <= 2 * (y - exact).abs().max() + rounding


@every_example
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
def test_one_token_or_none(make: Callable[[], QuantizedLinear], shape: tuple[int, ...]) -> None:
    layer = make()
    assert layer(torch.randn(*shape, layer.in_features)).shape == (*shape, layer.out_features)


@every_example
def test_saved_and_rebuilt_from_the_entry_alone(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    rebuilt = build(json.loads(json.dumps(layer.entry())))
    assert not any(parameter.any() for parameter in rebuilt.parameters())
    rebuilt.load_state_dict(load(by_bytes(layer)))
    assert type(rebuilt) is type(layer) and rebuilt.entry() == layer.entry()
    assert by_bytes(rebuilt) == by_bytes(layer)
    assert torch.equal(rebuilt.dequantize(), layer.dequantize())


@every_example
def test_built_on_meta(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    with torch.device("meta"):
        empty = build(layer.entry())
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert shapes(empty) == shapes(layer)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert by_bytes(empty) == by_bytes(layer)


@every_example
def test_bytes_are_those_of_the_formula(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    numbers = {key: value for key, value in layer.entry().items() if key not in ("format", "bias")}
    formula = inspect.getmodule(type(layer)).tensor_bytes  # type: ignore[union-attr]
    assert formula(**numbers) == layer.weight_bytes()
    bias = 0 if layer.bias is None else layer.bias.nbytes
    assert (
        sum(tensor.nbytes for tensor in layer.state_dict().values()) - bias == layer.weight_bytes()
    )


@every_example
def test_stored_dtypes_survive_a_cast(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    before = by_bytes(layer)
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double(), layer.float()):
        assert by_bytes(cast) == before


@every_example
def test_all_tensors_are_frozen_parameters(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    assert not list(layer.buffers()) and "weight" not in layer.state_dict()
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@every_example
def test_bad_entries_are_refused_by_name(make: Callable[[], QuantizedLinear]) -> None:
    entry = make().entry()
    for key in entry.keys() - {"format"}:
        for bad in ({k: v for k, v in entry.items() if k != key}, entry | {key: ["", {}]}):
            with pytest.raises(ValueError, match=key):
                build(bad)
    with pytest.raises(ValueError, match=r"'shapes' is not a field .* did you mean 'shape'"):
        build(entry | {"shapes": [1, 1]})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r"entry is \[\]: allowed is a dict"),
        ({}, "not a format: allowed are .*uniform"),
        ({"format": "unifrom"}, "'unifrom' is not a format: did you mean 'uniform'"),
        ({"format": ["uniform"]}, "not a format: .*allowed are .*uniform"),
        ({"format": None}, "'None' is not a format: .*allowed are .*uniform"),
    ],
    ids=str,
)
def test_unknown_formats_are_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(entry)  # type: ignore[arg-type]
