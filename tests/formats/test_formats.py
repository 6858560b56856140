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
from lowbit.formats.lattice import LatticeLinear
from lowbit.formats.lattice.codebooks import codebook
from lowbit.formats.lattice.incoherence import rotation
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
    symmetric, shift = zero_shift is None, zero_shift or 0
    groups = 1 if group_size is None else -(-columns // group_size)
    return UniformLinear.from_codes(
        torch.randint(0, 2**bits, (rows, columns), generator=draw, dtype=torch.uint8),
        (torch.rand(rows, groups, generator=draw) + 0.1) * scale,
        None
        if symmetric
        else torch.randint(0, 2 ** (bits + shift), (rows, groups), generator=draw),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
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


EXAMPLES: dict[str, Callable[[], QuantizedLinear]] = {
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
    y = torch.nn.functional.linear(x, weight.to(dtype))
    if layer.bias is not None:
        y = torch.nn.functional.linear(x, weight.to(dtype), layer.bias.to(dtype))
    assert layer(x).dtype == dtype
    if type(layer).forward is QuantizedLinear.forward:
        assert torch.equal(layer(x), y)
    exact = x.double() @ weight.double().T
    exact = exact if layer.bias is None else exact + layer.bias.double()
    # Twice torch's own error, and the rounding of the weight to the float32 that is shown.
    rounding = 2**-23 * (x.double().abs() @ weight.double().abs().T).max()
    assert (layer(x) - exact).abs().max() <= 2 * (y - exact).abs().max() + rounding


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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r"entry is \[\]: allowed is a dict"),
        ({}, "no format: allowed are .*uniform"),
        ({"format": "unifrom"}, "'unifrom' is no format: did you mean 'uniform'"),
        ({"format": ["uniform"]}, "no format: .*allowed are .*uniform"),
        ({"format": None}, "'None' is no format: .*allowed are .*uniform"),
    ],
    ids=str,
)
def test_unknown_formats_are_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(entry)  # type: ignore[arg-type]
