from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.formats import build
from lowbit.formats.uniform import UniformLayout, UniformLinear, reference, tensor_bytes
from lowbit.kernels.tokens import round_tokens

ENTRY: dict[str, Any] = {
    "format": "uniform",
    "shape": [6, 40],
    "bias": "float16",
    "bits": 4,
    "group_size": 16,
    "symmetric": False,
    "zero_shift": 0,
    "scale_dtype": "float16",
}
# Normal in float16, subnormal there, overflowing there, and at the ends of float32.
MAGNITUDES = [1.0, 1e-4, 6e-5, 1e-8, 1e-30, 7e4, 1e30]


def grid_of(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Round-to-nearest's scale and float zero, group by group: slow, plain and independent."""
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    starts = range(0, columns, size)
    low = torch.stack([weight[:, i : i + size].amin(1).clamp(max=0) for i in starts], 1)
    high = torch.stack([weight[:, i : i + size].amax(1).clamp(min=0) for i in starts], 1)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.where(scale > 0, -low / scale, 3.0)


def spread(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    """(out, groups) -> (out, in): what each weight is counted with."""
    size = columns if group_size is None else group_size
    return per_group.repeat_interleave(size, dim=1)[:, :columns]


def by_the_docstring(entry: dict[str, Any], tensors: dict[str, bytes]) -> numpy.ndarray:
    """A reader written from the module's docstring alone, in Python's integers and float64."""
    rows, columns = entry["shape"]
    bits, size = entry["bits"], entry["group_size"] or columns
    groups = -(-columns // size)

    def number(name: str, width: int, per_row: int, row: int, j: int) -> int:
        row_bytes = (per_row * width + 7) // 8
        stream = int.from_bytes(tensors[name][row * row_bytes : (row + 1) * row_bytes], "little")
        return (stream >> (j * width)) % 2**width

    scale_type = {"float16": "<f2", "float32": "<f4"}[entry["scale_dtype"]]
    scale = numpy.frombuffer(tensors["scale"], scale_type).reshape(rows, groups).astype(float)
    weight = numpy.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            zero = 2 ** (bits - 1)
            if not entry["symmetric"]:
                width = bits + entry["zero_shift"]
                zero = number("zero", width, rows, j // size, i) / 2 ** entry["zero_shift"]
            weight[i, j] = scale[i, j // size] * (number("packed", bits, columns, i, j) - zero)
    return weight


@st.composite
def layers(draw: st.DrawFn) -> tuple[UniformLinear, Tensor]:
    """A layer of random codes, and the codes."""
    bits = draw(st.integers(2, 8))
    rows, columns = draw(st.integers(1, 11)), draw(st.integers(1, 19))
    group_size = draw(st.none() | st.integers(1, 21))
    shift = draw(st.none() | st.integers(0, 8 - bits))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    groups = reference.group_count(columns, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=random, dtype=torch.uint8)
    scale = torch.randn(rows, groups, generator=random) * draw(st.sampled_from(MAGNITUDES))
    zero = torch.randint(0, 2 ** (bits + (shift or 0)), (rows, groups), generator=random)
    layer = UniformLinear.from_codes(
        codes,
        scale,
        None if shift is None else zero,
        UniformLayout(bits, group_size, shift or 0),
    )
    assert torch.equal(
        layer.zeros(), torch.full_like(zero, 2 ** (bits - 1)) if shift is None else zero
    )
    return layer, codes


@settings(max_examples=80, deadline=None)
@given(layers())
def test_stored_as_the_docstring_says(drawn: tuple[UniformLinear, Tensor]) -> None:
    layer, codes = drawn
    assert torch.equal(layer.codes(), codes)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in layer.named_parameters()}
    exact = by_the_docstring(layer.entry(), tensors)
    # float64 holds the product exactly, so that float32 has one rounding to agree on.
    assert numpy.array_equal(layer.dequantize().numpy(), exact.astype(numpy.float32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 1, 16, 40, 64])
def test_codes_are_counted_from_the_stored_scale(bits: int, group_size: int | None) -> None:
    for magnitude in MAGNITUDES:
        weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits)) * magnitude
        weight[2] = 0
        for shift in {0, 8 - bits}:
            check_codes(weight, bits, group_size, shift)


def check_codes(weight: Tensor, bits: int, group_size: int | None, shift: int) -> None:
    """Against round-to-nearest spelt out; row 2 of the weight is zero."""
    scale, zero = grid_of(weight, bits, group_size)
    zero[torch.arange(6) != 2] += 0.3 if shift else 0.0
    layout = UniformLayout(bits, group_size, shift)
    layer = UniformLinear.from_grid(weight, scale, zero, layout)
    point = spread(layer.zeros().float() / 2**shift, group_size, 40)
    step = spread(layer.scale.float(), group_size, 40)
    expected = torch.where(step == 0, point, weight / step + point).round()
    expected = expected.clamp(0, 2**bits - 1)
    near_a_tie = ((weight / step + point) % 1 - 0.5).abs() < 1e-4
    assert torch.equal(layer.codes()[~near_a_tie].float(), expected[~near_a_tie])
    assert not layer.dequantize()[2].any() and torch.all(layer.codes()[2] == 3)
    again = UniformLinear.from_grid(weight, layer.scale, layer.zeros() / 2**shift, layout)
    assert again.entry() == layer.entry()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True)
    )
    # Half a step of rounding, and where float16 rounded the scale down, what is clamped at the end.
    slack = step * (0.5 + 2.0**bits * 2**-11 + (point - spread(zero, group_size, 40)).abs())
    assert torch.all((layer.dequantize() - weight).abs() <= slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_ties_round_to_even_and_ends_clamp(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-9, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9]], dtype=dtype)
    layer = UniformLinear.from_grid(weight, torch.ones(1, 1), None, UniformLayout(3, None))
    assert layer.codes().tolist() == [[0, 2, 2, 4, 4, 6, 6, 7]]
    assert layer.zero is None and layer.zeros().tolist() == [[4]]


def test_zero_points_are_rounded_and_clamped() -> None:
    zero = torch.tensor([[-3.0], [0.5], [1.5], [99.0]])
    layer = UniformLinear.from_grid(
        torch.zeros(4, 2), torch.ones(4, 1), zero, UniformLayout(2, None)
    )
    assert layer.zeros().tolist() == [[0], [0], [2], [3]]
    assert torch.equal(layer.codes(), layer.zeros().expand(4, 2))


def test_groups_never_straddle_rows() -> None:
    """64 x 200 in groups of 128 has 128 groups; cut without regard to rows it would have 100."""
    weight = torch.arange(64 * 200.0).reshape(64, 200)
    scale, zero = grid_of(weight, 4, 128)
    assert scale.shape == (64, 2)
    layout = UniformLayout(4, 128)
    layer = UniformLinear.from_grid(weight, scale, zero, layout)
    changed = scale.clone()
    changed[5, 1] *= 4
    other = UniformLinear.from_grid(weight, changed, zero, layout)
    touched = (layer.dequantize() != other.dequantize()).nonzero()
    assert set(touched[:, 0].tolist()) == {5} and int(touched[:, 1].min()) >= 128


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        ([1.0, 0.0], torch.float16),
        ([-(2.0**-14), 65504.0], torch.float16),
        ([1.0, 2.0**-14 - 2.0**-30], torch.float32),
        ([1.0, -65505.0], torch.float32),
        ([1e-40, 3e38], torch.float32),
    ],
    ids=str,
)
def test_dtype_of_the_scale(scale: list[float], dtype: torch.dtype) -> None:
    layer = UniformLinear.from_grid(
        torch.ones(1, 2), torch.tensor([scale]), None, UniformLayout(4, 1)
    )
    assert layer.scale.dtype == dtype and layer.dequantize().isfinite().all()
    assert torch.equal(layer.scale.float(), torch.tensor([scale]))


def test_gradients_and_bias_dtype_stay_outside() -> None:
    weight, scale, bias = (torch.ones(2, 2, requires_grad=True) for _ in range(3))
    layer = UniformLinear.from_grid(
        weight, scale, scale, UniformLayout(4, 1), bias=bias[0].bfloat16()
    )
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    x = torch.ones(1, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def made(**changes: Any) -> UniformLinear:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(6, 40, dtype=torch.uint8),
        "scale": torch.ones(6, 3),
        "zero": torch.zeros(6, 3, dtype=torch.int32),
        "layout": UniformLayout(4, 16),
    }
    return UniformLinear.from_codes(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": UniformLayout(9, 16)}, "bits"),
        ({"layout": UniformLayout(4, 0)}, "group_size"),
        ({"codes": torch.zeros(40, dtype=torch.uint8)}, "shape"),
        ({"codes": torch.zeros(6, 40)}, "codes is torch.float32: allowed is torch.uint8"),
        ({"codes": torch.full((6, 40), 16, dtype=torch.uint8)}, "codes go up to 16"),
        ({"scale": torch.ones(6, 2)}, r"scale is \(6, 2\): this layer takes \(6, 3\)"),
        ({"scale": torch.full((6, 3), torch.nan)}, "scale has values that are not finite"),
        ({"zero": torch.zeros(3, 6, dtype=torch.int32)}, r"zero is \(3, 6\): this layer takes"),
        ({"zero": torch.zeros(6, 3)}, "zero is torch.float32: allowed are integer dtypes"),
        (
            {"zero": torch.full((6, 3), -1)},
            "zero goes from -1 to -1: allowed at 4 bits are 0 to 15",
        ),
        (
            {"zero": torch.full((6, 3), 64), "layout": UniformLayout(4, 16, 2)},
            "allowed at 6 bits are 0 to 63",
        ),
        ({"zero": torch.full((6, 3), 17)}, "zero goes from 17 to 17: allowed at 4 bits"),
        (
            {"layout": UniformLayout(4, 16, 5)},
            "zero_shift is 5: allowed with bits 4 and symmetric False are 0 to 4",
        ),
        ({"zero": None, "layout": UniformLayout(4, 16, 1)}, "zero_shift is 1: .* True are 0 to 0"),
        ({"bias": torch.ones(5)}, r"bias is \(5,\): this layer takes \(6,\)"),
        ({"bias": torch.ones(6).double()}, "bias"),
    ],
    ids=str,
)
def test_bad_tensors_are_refused(changes: dict[str, Any], message: str) -> None:
    made()
    with pytest.raises(ValueError, match=message):
        made(**changes)


def test_bad_weights_are_refused() -> None:
    good: dict[str, Any] = {
        "weight": torch.ones(2, 2),
        "scale": torch.ones(2, 1),
        "zero": torch.ones(2, 1),
    }
    for name in good:
        with pytest.raises(ValueError, match=f"{name} has values that are not finite in float32"):
            UniformLinear.from_grid(
                **(good | {name: good[name] / 0}), layout=UniformLayout(4, None)
            )


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_entry_that_rounds_inputs(symmetric: bool) -> None:
    """It has no more bytes, and an entry that does not say so has no word of it."""
    plain = UniformLinear.from_grid(
        torch.randn(6, 40, generator=torch.Generator().manual_seed(0)),
        torch.full((6, 1), 0.3),
        torch.full((6, 1), 7.0),
        UniformLayout(4, None),
    )
    assert "activation" not in plain.entry() and plain.activation is None
    entry = plain.entry() | {"activation": {"bits": 4, "symmetric": symmetric}}
    layer = build(entry)
    layer.load_state_dict(plain.state_dict())
    assert build(layer.entry()).entry() == layer.entry() == entry
    assert layer.weight_bytes() == plain.weight_bytes() == tensor_bytes(**sizes(plain.entry()))
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), plain(round_tokens(x, 4, symmetric)))
    assert not torch.equal(layer(x), plain(x))
    for wrong, message in (({"bits": 2, "symmetric": True}, "bits"), (4, "activation")):
        with pytest.raises(ValueError, match=message):
            build(entry | {"activation": wrong})


def test_made_with_the_dtype_of_the_weight() -> None:
    layer = made(dtype=torch.float16)
    assert layer.entry()["dtype"] == "float16" and "dtype" not in made().entry()
    grid = torch.ones(2, 4), torch.ones(2, 1), None, UniformLayout(4, None)
    assert UniformLinear.from_grid(*grid, dtype=torch.float32).entry()["dtype"] == "float32"


def sizes(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("format", "bias")}


def test_formula_on_hand_counted_bytes() -> None:
    # 5 rows of 37 3-bit codes: 14 bytes each; 3 groups: 15 scales; 3 rows of 5 5-bit zeros: 4 each.
    assert tensor_bytes((5, 37), 3, 16, False, 2, "float16") == 5 * 14 + 15 * 2 + 3 * 4
    assert tensor_bytes((5, 37), 3, 16, True, 0, "float32") == 5 * 14 + 15 * 4
    assert tensor_bytes((4096, 4096), 2, None, True, 0, "float16") == 4096 * (1024 + 2)


BAD_VALUES: dict[str, list[Any]] = {
    "shape": [None, 6, [], [6], [6, 40, 1], [0, 40], [-6, 40], [6, 2**31], [6.0, 40], [True, 40]],
    "bias": ["float64", "int8", "", 1, True],
    "bits": [None, 1, 9, -4, 4.0, "4", True],
    "group_size": [0, -16, 2**31, 16.0, "16", True],
    "symmetric": [None, 0, 1, "false"],
    "zero_shift": [None, -1, 5, 7, 2.0, "0", False],
    "scale_dtype": [None, "bfloat16", "float64", "uint8", 16],
    "format": ["UNIFORM", "", None],
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_values_are_refused_by_name(key: str) -> None:
    build(ENTRY)
    for value in BAD_VALUES[key]:
        with pytest.raises(ValueError, match=key):
            build(ENTRY | {key: value})


def test_other_bad_entries() -> None:
    huge = ENTRY | {"shape": [2**31 - 1, 2**31 - 1], "group_size": 1}
    with pytest.raises(
        ValueError, match="'group_sizes' is not a field .*did you mean 'group_size'"
    ):
        build(ENTRY | {"group_sizes": 4})
    with pytest.raises(ValueError, match="zero_shift is 1: .*symmetric True are 0 to 0"):
        build(ENTRY | {"symmetric": True, "zero_shift": 1})
    with torch.device("meta"):
        with pytest.raises(ValueError, match="shape is .*: allowed are layers below"):
            build(huge | {"scale_dtype": "float32"})
        assert build(huge | {"bits": 2, "group_size": 128}).weight_bytes() > 2**60
